"""The catalogue: public cloud images by name, where they are fetched from, how they are checked.

What is shipped (``catalogue.toml`` beside this file, which tells the form) is completed and
overridden by the file of the same name in the data directory, key by key.

The names of what is built here from packages (``tiny``, ``debian:12``) are not for a catalogue:
``croft run debian:12`` always means the built one, Debian's own image is ``debian:12-cloud``.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from undercroft.model.checks import check_user
from undercroft.model.errors import DataError, InvalidError, NotFoundError
from undercroft.model.image import DiskFormat
from undercroft.model.names import check_name
from undercroft.model.units import MiB, TiB, parse_size
from undercroft.storage.checksums import Checksum, checksum_in
from undercroft.storage.fetch import FetchOptions, fetch_text
from undercroft.storage.http import check_url

__all__ = [
    "FILE_NAME",
    "CatalogueEntry",
    "find_entry",
    "load_catalogue",
    "wanted_checksum",
]

FILE_NAME = "catalogue.toml"
_SHIPPED = Path(__file__).with_name(FILE_NAME)
_BUILT = re.compile(r"tiny(?::.*)?|debian:\d+")
_MAX_FILE = 1 * MiB


class CatalogueEntry(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """A public image. ``checksum`` is one (see `Checksum.parse`) or the address of a list of them;
    ``memory`` in bytes is what a VM needs at least to be of use."""

    name: str
    title: str = ""
    os: str = "unknown"
    url: str
    checksum: str
    format: DiskFormat = DiskFormat.QCOW2
    firmware: Literal["bios", "uefi"] = "bios"
    user: str | None = None
    memory: int = 512 * MiB
    arch: str = "x86_64"
    agent: bool = False
    cloud_init: bool = True


def load_catalogue(own: Path | None = None) -> dict[str, CatalogueEntry]:
    """What is shipped, with what the file ``own`` adds or changes, if it is there; by name.

    Reads two small files each time: they may be edited while the daemon runs.

    Raises:
        DataError: the file makes no sense; the message names file, line and entry.
    """
    shipped, _ = _read(_SHIPPED)
    added, lines = ({}, {}) if own is None else _read(own)
    entries = {name: _entry(_SHIPPED, name, None, values) for name, values in shipped.items()}
    for name, values in added.items():
        merged = {**shipped.get(name, {}), **values}
        entries[name] = _entry(own or _SHIPPED, name, lines.get(name), merged)
    return entries


def find_entry(entries: dict[str, CatalogueEntry], name: str) -> CatalogueEntry:
    """The entry of that name.

    Raises:
        NotFoundError: there is none; says which may have been meant.
    """
    if name in entries:
        return entries[name]
    from difflib import get_close_matches

    near = [f"{name}-cloud"] if f"{name}-cloud" in entries else []
    near += get_close_matches(name, [n for n in entries if n not in near], n=3 - len(near))
    action = "see what there is with: croft image catalogue"
    if near:
        action = f"did you mean {' or '.join(near)}? All of them: croft image catalogue"
    if name in ("tiny", "debian:12"):
        action = f"build it: croft image build {name}; or {action}"
    raise NotFoundError(
        f"the catalogue has no image {name[:80]}", object=f"image {name[:80]}", action=action
    )


async def wanted_checksum(entry: CatalogueEntry, options: FetchOptions | None = None) -> Checksum:
    """What the image's file must have: as stated, or as listed where the entry points to.

    Raises:
        FetchError: there is no such list, or the file is not in it.
    """
    if not entry.checksum.startswith(("http://", "https://")):
        return Checksum.parse(entry.checksum)
    text = await fetch_text(entry.checksum, options)
    file = check_url(entry.url).path.rpartition("/")[2]
    return checksum_in(text, file, entry.checksum)


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """The tables of a file, and the lines where they begin, as far as they are easily seen."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE + 1).decode()
    except FileNotFoundError:
        return {}, {}
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _wrong(path, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if len(text) > _MAX_FILE:
        raise _wrong(path, "is too large to be a catalogue")
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _wrong(path, f"is not TOML: {error}") from None
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"""\s*\[\s*["']?([^\]"']+?)["']?\s*\]""", line):
            lines.setdefault(match.group(1), number)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise _wrong(path, f'has {name!r} outside of an entry: begin one with ["name:tag"]')
    return tables, lines


def _entry(path: Path, name: str, line: int | None, values: dict[str, Any]) -> CatalogueEntry:
    """A checked entry."""
    where = f"entry {name[:80]!r}" + (f" (line {line})" if line else "")
    try:
        if _BUILT.fullmatch(name):
            raise InvalidError("what is built here keeps its name; choose another")
        check_name(name, "image")
        if "name" in values:
            raise InvalidError("the name is what stands in the brackets")
        if isinstance(values.get("memory"), str):
            values = {**values, "memory": parse_size(values["memory"])}
        entry = msgspec.convert({"name": name, **values}, CatalogueEntry)
        check_url(entry.url)
        if entry.checksum.startswith(("http://", "https://")):
            check_url(entry.checksum)
        else:
            Checksum.parse(entry.checksum)
        if entry.user is not None:
            check_user(entry.user)
        if not 16 * MiB <= entry.memory <= TiB:
            raise InvalidError("the memory is no sensible size")
    except InvalidError as error:
        raise _wrong(path, f"{where}: {error.message}", error.action) from None
    except msgspec.ValidationError as error:
        raise _wrong(path, f"{where}: {error}") from None
    return entry


def _wrong(path: Path, reason: str, action: str | None = None) -> DataError:
    return DataError(
        f"{path}: {reason}",
        object=str(path),
        action=action or "correct the file; the shipped one, beside the program, shows the form",
    )
