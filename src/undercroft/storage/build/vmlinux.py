"""A kernel image, unpacked beforehand: what boots fastest without hardware virtualization.

A bzImage unpacks itself in the guest, which under emulation takes seconds for xz (Debian's generic
kernel). QEMU boots the unpacked ELF file through its PVH entry point instead. Measured under TCG:
tiny 1.4 s of CPU less, the generic kernel more than 20 s less, and 50 MB less of host memory. The
price is that the guest's kernel does not randomize its own address (KASLR happens while unpacking).

Format: Linux, Documentation/arch/x86/boot.rst (payload_offset, payload_length).
"""

from __future__ import annotations

import asyncio
import lzma
import shutil
import struct
import zlib
from pathlib import Path

from undercroft.model.errors import MissingToolError, ProgramError
from undercroft.storage.process import run, tool

__all__ = ["write_kernel"]

_PROTOCOL = 0x0208  # of the first boot protocol that tells where the payload is
_PVH_NOTE = struct.pack("<I4s", 18, b"Xen\0")  # XEN_ELFNOTE_PHYS32_ENTRY, and its owner
_COMMANDS = {b"\x02\x21\x4c\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd"}
_LIMIT = 256 << 20


async def write_kernel(image: Path, target: Path) -> None:
    """Writes the kernel of a bzImage to ``target``: unpacked if it can be booted so, else as it is.

    lz4 and zstd are unpacked by the programs of these names, if they are installed.
    """
    payload = await asyncio.to_thread(_payload, image)
    unpacked = await _unpack(payload) if payload is not None else None
    if unpacked is None or not _bootable(unpacked):
        await asyncio.to_thread(shutil.copyfile, image, target)
    else:
        await asyncio.to_thread(target.write_bytes, unpacked)


def _payload(image: Path) -> bytes | None:
    data = image.read_bytes()
    if len(data) < 0x250 or data[0x202:0x206] != b"HdrS":
        return None
    (protocol,) = struct.unpack_from("<H", data, 0x206)
    if protocol < _PROTOCOL:
        return None
    start, length = struct.unpack_from("<II", data, 0x248)
    start += ((data[0x1F1] or 4) + 1) * 512
    return data[start : start + length]


async def _unpack(payload: bytes) -> bytes | None:
    """The payload, if it can be unpacked to the size that its last four bytes tell."""
    size = int.from_bytes(payload[-4:], "little")
    if not 0 < size <= _LIMIT:
        return None
    program = _COMMANDS.get(payload[:4])
    try:
        if program is not None:
            command = [tool(program, package=program), "-d", "-c", "-q"]
            data = await run(command, stdin=payload[:-4], timeout=300, output_limit=_LIMIT)
        else:
            data = await asyncio.to_thread(_unpack_here, payload)
    except (MissingToolError, ProgramError, OSError, EOFError, lzma.LZMAError, zlib.error):
        return None
    return data if len(data) == size else None


def _unpack_here(payload: bytes) -> bytes:
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    return zlib.decompressobj(wbits=31).decompress(payload)


def _bootable(kernel: bytes) -> bool:
    """Whether it is a 64-bit ELF file with a PVH entry point."""
    return kernel.startswith(b"\x7fELF\x02\x01") and _PVH_NOTE in kernel
