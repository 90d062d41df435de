"""Templates: frozen VMs to make others from.

A template keeps what the disks of a VM held at one moment, and perhaps what it had in memory and
its processors: then VMs made from it go on from there instead of booting.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from undercroft.model.base import Model, Record, Spec
from undercroft.model.vm import Disk, VMSpec


class TemplateState(StrEnum):
    """Life of a template."""

    PENDING = "pending"  # being made
    READY = "ready"


class TemplateSpec(Spec, frozen=True, kw_only=True):
    """What was asked for. ``source`` is the VM (an id) that it is made from; ``memory`` whether
    what its guest has in memory belongs to it; ``passing``: it goes again when the VMs are there
    that it was made for. ``warm``: it was made by itself, for new VMs with this key
    (`undercroft.operations.warm`)."""

    host: str
    source: str
    description: str = ""
    memory: bool = False
    quiesce: bool = False
    passing: bool = False
    warm: str = ""


class TemplateDisk(Model, frozen=True, kw_only=True):
    """A frozen disk: its ``layer`` (an id), the ``size`` in bytes that a guest sees, the ``image``
    (an id) at the bottom, and how it is attached (``disk``, whose volume is that of the source)."""

    layer: str
    size: int
    image: str | None
    disk: Disk


class TemplateStatus(Model, frozen=True, kw_only=True):
    """What it is. ``shape`` is what the source was like; ``memory``: bytes on the host that its
    frozen memory takes, 0 if it has none; ``agent``: whether a guest agent answered then."""

    state: TemplateState = TemplateState.PENDING
    disks: tuple[TemplateDisk, ...] = ()
    shape: VMSpec | None = None
    memory: int = 0
    agent: bool = False


class Template(Record, frozen=True, kw_only=True):
    """A template. Nothing of what it has ever changes."""

    kind: ClassVar[str] = "template"
    spec: TemplateSpec
    status: TemplateStatus = TemplateStatus()
