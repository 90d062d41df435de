import gzip
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from undercroft.storage.build.vmlinux import write_kernel

VMLINUX = b"\x7fELF\x02\x01" + bytes(100) + struct.pack("<III4s", 4, 8, 18, b"Xen\0") + bytes(5000)


def bzimage(payload: bytes, size: int, protocol: int = 0x020F) -> bytes:
    """A kernel image whose decompressor is four sectors of nothing."""
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    payload += struct.pack("<I", size)
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    return bytes(setup) + bytes(64) + payload + b"relocations"


async def unpacked(tmp_path: Path, image: bytes) -> bytes:
    (tmp_path / "vmlinuz").write_bytes(image)
    await write_kernel(tmp_path / "vmlinuz", tmp_path / "kernel")
    return (tmp_path / "kernel").read_bytes()


@pytest.mark.parametrize("name", ["xz", "gzip", "lz4", "zstd"])
async def test_unpacks_what_kernels_are_packed_with(tmp_path: Path, name: str):
    if name == "xz":
        packed = lzma.compress(VMLINUX)
    elif name == "gzip":
        packed = gzip.compress(VMLINUX)
    else:
        program = shutil.which(name)
        if program is None:
            pytest.skip(f"needs {name}")
        options = ["-l"] if name == "lz4" else []  # kernels use lz4's legacy frame
        packed = subprocess.run(
            [program, *options, "-c"], input=VMLINUX, capture_output=True, check=True
        ).stdout
    assert await unpacked(tmp_path, bzimage(packed, len(VMLINUX))) == VMLINUX


async def test_what_cannot_be_unpacked_is_left_as_it_is(tmp_path: Path):
    packed = lzma.compress(VMLINUX)
    no_pvh = VMLINUX.replace(b"Xen\0", b"Nex\0")
    for image in (
        bzimage(packed, len(VMLINUX) + 1),
        bzimage(packed[:-50], len(VMLINUX)),
        bzimage(packed, len(VMLINUX), protocol=0x0207),
        bzimage(lzma.compress(no_pvh), len(no_pvh)),
        bzimage(b"\x99" * 50, 5000),
        b"not a kernel",
        b"",
    ):
        assert await unpacked(tmp_path, image) == image
