"""A disk image with a GPT, boot loaders for BIOS and UEFI, and a root file system.

Made as a plain file: no loop device, no mount, no root.
"""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

from undercroft.model.errors import UndercroftError
from undercroft.model.units import MiB
from undercroft.storage.process import run, tool

__all__ = ["ESP", "ROOT", "Partition", "install_bios_loader", "make_esp", "partition"]

_SECTOR = 512
_ENTRIES, _ENTRY_SIZE = 128, 128


@dataclass(frozen=True)
class Partition:
    """Where a partition begins and how long it is (bytes; the last takes what is left), and its
    GPT type."""

    name: str
    start: int
    size: int | None
    type: uuid.UUID


# All begin at whole MiB. The root comes last, so that it can grow with the disk.
BIOS = Partition("bios", 1 * MiB, 1 * MiB, uuid.UUID("21686148-6449-6E6F-744E-656564454649"))
ESP = Partition("esp", 2 * MiB, 48 * MiB, uuid.UUID("C12A7328-F81F-11D2-BA4B-00A0C93EC93B"))
ROOT = Partition("root", 50 * MiB, None, uuid.UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4"))


def partition(disk: Path, size: int) -> None:
    """Makes a sparse file of ``size`` bytes with a GPT (UEFI 2.10, chapter 5.3)."""
    sectors = size // _SECTOR
    entries = bytearray(_ENTRIES * _ENTRY_SIZE)
    for index, part in enumerate((BIOS, ESP, ROOT)):
        length = part.size if part.size is not None else root_size(size)
        first = part.start // _SECTOR
        struct.pack_into(
            "<16s16sQQQ72s", entries, index * _ENTRY_SIZE, part.type.bytes_le,
            uuid.uuid4().bytes_le, first, first + length // _SECTOR - 1, 0,
            part.name.encode("utf-16-le"),
        )  # fmt: skip
    table_sectors = len(entries) // _SECTOR
    identity = uuid.uuid4().bytes_le
    checksum = zlib.crc32(entries)

    def header(here: int, other: int, table: int) -> bytes:
        packed = struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x00010000, 92, 0, 0, here, other,
            2 + table_sectors, sectors - 2 - table_sectors, identity, table, _ENTRIES,
            _ENTRY_SIZE, checksum,
        )  # fmt: skip
        return packed[:16] + struct.pack("<I", zlib.crc32(packed)) + packed[20:]

    # The protective MBR: one partition over all, so that old tools see no empty disk.
    mbr = bytearray(_SECTOR)
    covered = min(sectors - 1, 0xFFFFFFFF)
    struct.pack_into("<BBBBBBBBII", mbr, 446, 0, 0, 2, 0, 0xEE, 255, 255, 255, 1, covered)
    mbr[510:] = b"\x55\xaa"
    backup = sectors - 1 - table_sectors
    with disk.open("wb") as file:
        file.truncate(size)
        file.write(mbr + header(1, sectors - 1, 2).ljust(_SECTOR, b"\0") + entries)
        file.seek(backup * _SECTOR)
        file.write(entries + header(sectors - 1, 1, backup).ljust(_SECTOR, b"\0"))


def root_size(size: int) -> int:
    """Bytes that the root file system can have on a disk of ``size`` bytes; the backup GPT (33
    sectors, rounded up) comes after it."""
    return size - ROOT.start - 1 * MiB


async def make_esp(disk: Path, work: Path, files: dict[str, Path]) -> None:
    """Writes the EFI system partition with the given files (path inside, with ``/``: content).

    Raises:
        MissingToolError: dosfstools or mtools are not installed.
    """
    image = work / "esp.img"
    with image.open("wb") as file:
        file.truncate(ESP.size)
    await run(
        [tool("mkfs.vfat", package="dosfstools"), "-F", "32", "-s", "1", "-n", "ESP", str(image)],
        timeout=60,
    )
    mmd = tool("mmd", package="mtools")
    mcopy = tool("mcopy", package="mtools")
    made: set[str] = set()
    for name, source in files.items():
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            directory = "/".join(parts[:depth])
            if directory not in made:
                made.add(directory)
                await run([mmd, "-i", str(image), f"::/{directory}"], timeout=60)
        await run([mcopy, "-i", str(image), str(source), f"::/{name}"], timeout=60)
    _copy_into(image, disk, ESP.start)
    image.unlink()


def _copy_into(source: Path, disk: Path, offset: int) -> None:
    with source.open("rb") as file, disk.open("r+b") as out:
        out.seek(offset)
        while chunk := file.read(1 * MiB):
            if chunk.count(0) == len(chunk):
                out.seek(len(chunk), os.SEEK_CUR)
            else:
                out.write(chunk)


def install_bios_loader(disk: Path, boot: bytes, core: bytes) -> None:
    """Puts GRUB's boot sector and core image onto the disk, as grub-bios-setup does.

    Offsets: GRUB 2.06, include/grub/i386/pc/boot.h and grub-core/boot/i386/pc/{boot,diskboot}.S.

    Raises:
        UndercroftError: the core image does not fit.
    """
    if len(boot) != _SECTOR or len(core) > (BIOS.size or 0) or len(core) < 2 * _SECTOR:
        raise UndercroftError("GRUB's images for BIOS do not have the size they must have")
    first = BIOS.start // _SECTOR
    sector = bytearray(boot)
    struct.pack_into("<Q", sector, 0x5C, first)  # GRUB_BOOT_MACHINE_KERNEL_SECTOR
    sector[0x64] = 0xFF  # GRUB_BOOT_MACHINE_BOOT_DRIVE: the one that the BIOS says
    sector[0x66:0x68] = b"\x90\x90"  # GRUB_BOOT_MACHINE_DRIVE_CHECK: trust the BIOS
    image = bytearray(core)
    # The block list at the end of the first sector: where the rest is, in sectors.
    struct.pack_into("<Q", image, _SECTOR - 12, first + 1)
    struct.pack_into("<H", image, _SECTOR - 4, -(-len(core) // _SECTOR) - 1)
    with disk.open("r+b") as file:
        table = file.read(_SECTOR)
        # The partition table of the protective MBR stays, with the boot signature.
        sector[0x1B8:] = table[0x1B8:]
        file.seek(0)
        file.write(sector)
        file.seek(BIOS.start)
        file.write(image)
