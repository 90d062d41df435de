"""XML from strangers: no document types (so no entities), nothing external, and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from undercroft.storage.appliance.tar import refused

__all__ = ["MAX_XML", "Element", "parse"]

MAX_XML = 4 << 20  # bytes
_DEPTH = 64
_ELEMENTS = 50_000
_SEPARATOR = "\n"  # between namespace and name: cannot be part of either


@dataclass
class Element:
    """An element. ``space`` is its namespace, ``name`` its local name; ``attributes`` by local
    name (no two that OVF knows differ only in their namespace)."""

    space: str
    name: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, name: str) -> Iterator[Element]:
        """The children of that name."""
        return (child for child in self.children if child.name == name)

    def first(self, name: str) -> Element | None:
        """The first of them."""
        return next(self.all(name), None)

    def value(self, name: str) -> str:
        """The text of the first child of that name, without space around it; empty: none."""
        child = self.first(name)
        return child.text.strip() if child is not None else ""


def parse(data: bytes) -> Element:
    """The root of a document.

    Raises:
        HostileImageError: it is not well-formed, too large, or declares a document type.
    """
    if len(data) > MAX_XML:
        raise refused("its descriptor is too large")
    parser = expat.ParserCreate(namespace_separator=_SEPARATOR)
    top = Element("", "", {})
    path = [top]
    count = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if len(path) > _DEPTH or count > _ELEMENTS:
            raise refused("its descriptor is too deep, or has too many parts")
        element = Element(*_split(name), {_split(k)[1]: v for k, v in attributes.items()})
        path[-1].children.append(element)
        path.append(element)

    def end(name: str) -> None:
        path.pop()

    def characters(text: str) -> None:
        path[-1].text += text

    def doctype(*_: object) -> None:
        raise refused("its descriptor declares a document type, which none needs")

    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise refused(f"its descriptor is not XML ({error})") from None
    except (ValueError, LookupError) as error:  # an encoding that nobody knows
        raise refused(f"its descriptor cannot be read ({error})") from None
    return top.children[0]


def _split(name: str) -> tuple[str, str]:
    space, separator, local = name.rpartition(_SEPARATOR)
    return (space, local) if separator else ("", name)
