import contextlib
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from undercroft.storage.build.elf import ElfError, module_depends, needed


def test_a_dynamic_program():
    shell = Path(shutil.which("sh") or "/bin/sh").read_bytes()
    libraries = needed(shell)
    assert libraries[0].startswith("/lib")  # the interpreter
    assert any(name.startswith("libc.so") for name in libraries)


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes):
    with pytest.raises(ElfError):
        needed(data)


@given(st.integers(0, 2000), st.integers(0, 255))
@example(39, 128)  # the table's offset does not fit into 63 bits
def test_a_damaged_program_never_crashes(at: int, value: int):
    data = bytearray(Path(sys.executable).resolve().read_bytes()[:20000])
    data[at % len(data)] = value
    with contextlib.suppress(ElfError):
        needed(bytes(data))


def test_module_depends():
    assert module_depends(b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0name=x\0") == [
        "virtio",
        "virtio_ring",
    ]
    assert module_depends(b"\x7fELF\0depends=\0") == []
    assert module_depends(b"no modinfo") == []
