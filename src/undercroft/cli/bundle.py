"""Packages that lie here as several files, put together on their way to the daemon."""

from __future__ import annotations

import os

from undercroft.cli.errors import UsageError
from undercroft.cli.sending import Files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST = 4 << 20  # bytes of a descriptor
_VMDK = b"# Disk DescriptorFile"


def is_descriptor(path: str, head: bytes) -> bool:
    """Whether a file that begins like this only names others that hold the disks."""
    return path.lower().endswith(".ovf") or head.startswith(_VMDK)


def bundle(path: str) -> Files:
    """A descriptor (OVF or VMDK) and the files that it names, which lie beside it, as an archive.

    Raises:
        UsageError: one is missing. HostileImageError: it names what lies elsewhere.
    """
    from undercroft.storage.appliance.tar import BLOCK, padding

    directory = os.path.dirname(os.path.abspath(path))
    with open(path, "rb") as file:
        text = file.read(_MOST + 1)
    if len(text) > _MOST:
        raise UsageError(f"{path} is too large for a descriptor", "name the file of the disk")
    if text.startswith(_VMDK):
        names = _named_by_vmdk(text)
    else:
        stem = os.path.splitext(os.path.basename(path))[0]
        beside = [f"{stem}.mf", f"{stem}.cert"]
        names = [n for n in beside if os.path.exists(os.path.join(directory, n))]
        names += _named_by_ovf(text, os.listdir(directory))
    parts: list[tuple[bytes, int | None]] = []
    before = 0  # size of the file whose padding comes next
    for name in dict.fromkeys([os.path.basename(path), *names]):
        descriptor = _open(directory, name, path)
        size = os.fstat(descriptor).st_size
        parts.append((bytes(padding(before)) + _head(name, size), descriptor))
        before = size
    parts.append((bytes(padding(before) + 2 * BLOCK), None))
    return Files(parts)


def _head(name: str, size: int) -> bytes:
    from undercroft.storage.appliance.tar import header, long_header

    short = len(name) <= 100 and name.isascii()
    return header(name, size) if short else long_header(name, size)


def _open(directory: str, name: str, path: str) -> int:
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        if name == os.path.basename(path):
            flags &= ~os.O_NOFOLLOW  # the user named it
        return os.open(os.path.join(directory, name), flags)
    except OSError as error:
        raise UsageError(
            f"{path} names {name}, which cannot be read: {error.strerror}",
            "a package has all its files, none of them a link, in one directory",
        ) from None


def _named_by_ovf(text: bytes, names: list[str]) -> Iterable[str]:
    from undercroft.storage.appliance.ovf import plain_reference
    from undercroft.storage.appliance.xml import parse

    section = parse(text).first("References")
    files = section.all("File") if section is not None else ()
    return [plain_reference(file.attributes.get("href", ""), names) for file in files]


def _named_by_vmdk(text: bytes) -> Iterable[str]:
    from undercroft.storage.appliance.tar import plain_name
    from undercroft.storage.formats.vmdk_extents import read_extents

    return [plain_name(extent.file) for extent in read_extents(text) if extent.file]
