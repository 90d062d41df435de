"""Request bodies: strict JSON of the model's types; errors name the place of what is wrong."""

from __future__ import annotations

from collections.abc import Generator
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from litestar.dto import AbstractDTO, DTOFieldDefinition
from litestar.typing import FieldDefinition

from undercroft.model.errors import InvalidError

MAX_BODY = 1 << 20
T = TypeVar("T")


class StrictJSON(AbstractDTO[Any]):
    """How Litestar reads bodies: left to itself it would turn ``"3"`` into 3, and its errors name
    no place."""

    model_type = object

    def decode_bytes(self, value: bytes) -> Any:
        """The body as the type that the handler wants."""
        field = self.asgi_connection.route_handler.parsed_data_field
        if not value.strip() and field.is_optional:
            return None
        return decode_body(value, field.annotation)

    @classmethod
    def is_supported_model_type_field(cls, field_definition: FieldDefinition) -> bool:
        """All types."""
        return True

    @classmethod
    def create_for_field_definition(
        cls,
        field_definition: FieldDefinition,
        handler_id: str,
        backend_cls: Any = None,
    ) -> None:
        """Needs no preparation."""

    @classmethod
    def generate_field_definitions(
        cls, model_type: type[Any]
    ) -> Generator[DTOFieldDefinition, None, None]:
        """None: the type is used as it is."""
        yield from ()

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        """No."""
        return False


@lru_cache(maxsize=64)
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def decode_body(data: bytes, kind: type[T]) -> T:
    """An object from JSON.

    Raises:
        InvalidError: it is not JSON, or not such an object; ``data`` has the ``path`` of the field.
    """
    if not data.strip():
        raise InvalidError("the request has no body", action="send a JSON object")
    try:
        return _decoder(kind).decode(data)  # type: ignore[no-any-return,arg-type]
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at ")
        path = place.strip("`") or "$"
        raise InvalidError(
            f"{text[:1].lower()}{text[1:]}" + (f" (at {path})" if path != "$" else ""),
            path=path,
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidError(f"the body is not JSON: {error}", action="send a JSON object") from None
