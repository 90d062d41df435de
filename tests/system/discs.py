"""Images of discs for tests."""

from __future__ import annotations

import io
import struct
import subprocess
from pathlib import Path

# Prints what follows on the serial port, up to a zero byte, and halts; the same for processors in
# 16 and in 64 bits. What comes before it leaves the text's address in (r)si and 0x3f8 in dx.
_PRINT = bytes.fromhex("AC 84C0 7410 88C4 B2FD EC A820 74FB B2F8 88E0 EE EBEB F4 EBFD")
_BIOS = bytes.fromhex("FA 0E 1F E80000 5E 81C62100 BAF803 FC")
_EFI = bytes.fromhex("488D351D000000 66BAF803 FC")
_PAGE, _BLOCK = 0x1000, 0x200


def make_disc(path: Path, label: str, **files: bytes) -> Path:
    """An image of a disc with this label and these files."""
    return _write(path, label, files)


def make_bootable(path: Path) -> Path:
    """An image of a disc that says ``BIOS-DISC`` or ``EFI-DISC`` on the serial port, after what
    booted it."""
    system = path.with_suffix(".fat")
    program = path.with_suffix(".efi")
    program.write_bytes(_efi_program(_EFI + _PRINT + b"EFI-DISC\r\n\0"))
    subprocess.run(["mformat", "-C", "-i", system, "-f", "1440", "::"], check=True)
    subprocess.run(["mmd", "-i", system, "::/EFI", "::/EFI/BOOT"], check=True)
    subprocess.run(["mcopy", "-i", system, program, "::/EFI/BOOT/BOOTX64.EFI"], check=True)
    bios = boot_sector("BIOS-DISC").ljust(2048, b"\0")
    return _write(path, "BOOT", {}, {"bios": bios, "efi": system.read_bytes()})


def boot_sector(text: str) -> bytes:
    """The first sector of a disk, or disc, that says ``text`` on the serial port."""
    code = _BIOS + _PRINT + text.encode() + b"\r\n\0"
    return code.ljust(510, b"\0") + b"\x55\xaa"


def _write(
    path: Path, label: str, files: dict[str, bytes], boot: dict[str, bytes] | None = None
) -> Path:
    import pycdlib

    disc = pycdlib.PyCdlib()
    disc.new(interchange_level=3, rock_ridge="1.09", vol_ident=label)
    for name, data in {**files, **(boot or {})}.items():
        short = f"/{name.upper()}.;1"
        disc.add_fp(io.BytesIO(data), len(data), short, rr_name=name)
    for name, data in (boot or {}).items():
        sectors = max(4, len(data) // 512)
        more = {"efi": True} if name == "efi" else {"rr_bootcatname": "boot.cat"}
        disc.add_eltorito(
            f"/{name.upper()}.;1", bootcatfile="/BOOT.CAT;1", boot_load_size=sectors, **more
        )
    disc.write(str(path))
    disc.close()
    return path


def _efi_program(code: bytes) -> bytes:
    """A PE32+ image for x86-64 with nothing but code (Microsoft PE and COFF specification)."""
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, 1, 0, 0, 0, 112 + 6 * 8, 0x22)
    optional = struct.pack(
        "<HBBIIIII QIIHHHHHHIIIIHH QQQQII",
        0x20B, 0, 0, _BLOCK, 0, 0, _PAGE, _PAGE,
        0, _PAGE, _BLOCK, 0, 0, 0, 0, 0, 0, 0, 2 * _PAGE, _BLOCK, 0, 10, 0,
        0, 0, 0, 0, 0, 6,
    )  # fmt: skip
    section = struct.pack(
        "<8sIIIIIIHHI", b".text", len(code), _PAGE, _BLOCK, _BLOCK, 0, 0, 0, 0, 0x60000020
    )
    head = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    head += coff + optional + bytes(6 * 8) + section
    return head.ljust(_BLOCK, b"\0") + code.ljust(_BLOCK, b"\0")
