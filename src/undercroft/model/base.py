"""What every object has in common."""

from __future__ import annotations

from typing import ClassVar

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all parts of objects: immutable, compared by value."""


class Spec(Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what a user may write: an unknown field is an error, not silently dropped."""


class Meta(Model, frozen=True, kw_only=True):
    """Who an object is.

    ``id`` never changes and is never used again; ``name`` is unique within its kind and project.
    ``created`` is in seconds since 1970 (UTC). ``generation`` counts the changes of the spec.
    """

    id: str
    name: str
    project: str = "default"
    created: float
    generation: int = 1
    labels: dict[str, str] = {}


class Record(Model, frozen=True, kw_only=True):
    """Base of what is written down in the store under its kind and `Meta.id`."""

    kind: ClassVar[str]
    meta: Meta

    @property
    def label(self) -> str:
        """How messages name this object: ``vm web1``."""
        return f"{self.kind} {self.meta.name}"


class Ref(Model, frozen=True, kw_only=True):
    """Points at an object, and still tells its name once it is gone."""

    kind: str
    id: str
    name: str

    @classmethod
    def to(cls, record: Record) -> Ref:
        """A reference to the given record."""
        return cls(kind=record.kind, id=record.meta.id, name=record.meta.name)
