"""Finding the QEMU programs of a host, and asking each its version once."""

import os
from pathlib import Path

import pytest

from undercroft.hypervisor.installed import (
    CACHE_FILE,
    installed_architectures,
    installed_emulators,
    known_version,
)
from undercroft.model.errors import MissingToolError, UnsupportedError


def program(path: Path, version: str) -> Path:
    """A program that tells a version, and notes in ``asked`` beside it that it was asked."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name("new")
    new.write_text(f'#!/bin/sh\necho x >> "{path}.asked"\necho "{version}"\n')
    new.chmod(0o755)
    os.replace(new, path)
    return path


def asked(path: Path) -> int:
    notes = path.with_name(path.name + ".asked")
    return len(notes.read_text().split()) if notes.exists() else 0


def test_architectures_by_their_own_names(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    x86 = program(first / "qemu-system-x86_64", "")
    (first / "qemu-system-amd64").symlink_to("qemu-system-x86_64")
    program(first / "qemu-system-x86_64-microvm", "")
    program(first / "qemu-img", "")
    (first / "qemu-system-m68k").touch(0o644)
    (first / "qemu-system-ppc64").mkdir()
    (first / "qemu-system-s390x").symlink_to("nowhere")
    program(second / "qemu-system-x86_64", "")
    arm = program(second / "qemu-system-aarch64", "")
    search = os.pathsep.join(["", str(tmp_path / "missing"), str(first), str(second)])
    assert list(installed_architectures(search).items()) == [
        ("aarch64", str(arm)),
        ("x86_64", str(x86)),
    ]


def test_a_program_of_another_name_counts_by_the_name_of_its_link(tmp_path: Path) -> None:
    real = program(tmp_path / "lib" / "qemu-kvm", "")
    (tmp_path / "qemu-system-x86_64").symlink_to(real)
    assert installed_architectures(str(tmp_path)) == {"x86_64": str(real)}


async def test_a_version_is_asked_once_per_program(tmp_path: Path) -> None:
    path = program(tmp_path / "bin" / "qemu-system-x86_64", "QEMU emulator version 9.1.3 (Debian)")
    other = program(tmp_path / "bin" / "qemu-system-arm", "QEMU emulator version 8.0")
    cache = tmp_path / "cache"
    for _ in range(3):
        assert await known_version(str(path), cache) == (9, 1, 3)
        assert await known_version(str(other), cache) == (8, 0, 0)
    assert (asked(path), asked(other)) == (1, 1)

    program(path, "QEMU emulator version 10.0.2")
    assert await known_version(str(path), cache) == (10, 0, 2)
    assert await known_version(str(path), cache) == (10, 0, 2)
    assert asked(path) == 2
    assert (cache / CACHE_FILE).read_text().count(str(path)) == 1  # the one that is gone is dropped

    (cache / CACHE_FILE).write_text("garbage")
    assert await known_version(str(path), cache) == (10, 0, 2)
    assert asked(path) == 3


async def test_what_is_not_qemu_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match="No such file"):
        await known_version(str(tmp_path / "missing"), tmp_path)
    path = program(tmp_path / "qemu-system-x86_64", "something else")
    with pytest.raises(UnsupportedError, match="something else"):
        await known_version(str(path), tmp_path)


async def test_emulators_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    usable = program(tmp_path / "qemu-system-x86_64", "QEMU emulator version 7.2.15")
    program(tmp_path / "qemu-system-arm", "QEMU emulator version 6.2.0")
    program(tmp_path / "qemu-system-ppc", "no version at all")
    found = await installed_emulators(tmp_path / "cache", str(tmp_path))
    assert [(one.arch, one.path, one.version_text) for one in found] == [
        ("x86_64", str(usable), "7.2.15")
    ]
