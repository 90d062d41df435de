"""Which firmware is taken, out of what packages describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from undercroft.hypervisor.firmware import find_firmware
from undercroft.model.errors import UnsupportedError
from undercroft.model.vm import Machine


class Shelf:
    """Directories with descriptors, in order of precedence."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.directories = (base / "etc", base / "share")
        for directory in self.directories:
            directory.mkdir()

    def put(self, name: str, *features: str, place: int = 1, **changes: Any) -> None:
        for suffix in ("code", "vars"):
            (self.base / f"{name}.{suffix}").touch()
        descriptor: dict[str, Any] = {
            "description": name,
            "interface-types": ["uefi"],
            "mapping": {
                "device": "flash",
                "executable": {"filename": f"{self.base}/{name}.code", "format": "raw"},
                "nvram-template": {"filename": f"{self.base}/{name}.vars", "format": "raw"},
            },
            "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
            "features": list(features),
            "tags": [],
        }
        path = self.directories[place] / f"{name}.json"
        path.write_text(json.dumps({**descriptor, **changes}))

    def find(self, *, secure: bool = False, arch: str = "x86_64") -> str:
        found = find_firmware(arch, Machine.Q35, secure_boot=secure, directories=self.directories)
        assert found.variables == found.code.replace(".code", ".vars")
        return Path(found.code).stem


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_names_decide(shelf: Shelf) -> None:
    shelf.put("60-b")
    shelf.put("50-a")
    assert shelf.find() == "50-a"


def test_secure_boot_needs_enrolled_keys(shelf: Shelf) -> None:
    shelf.put("40-enrolled", "secure-boot", "enrolled-keys", "requires-smm")
    shelf.put("30-empty", "secure-boot", "requires-smm")
    shelf.put("60-plain")
    assert shelf.find(secure=True) == "40-enrolled"
    assert shelf.find() == "60-plain"
    found = find_firmware("x86_64", Machine.Q35, secure_boot=True, directories=shelf.directories)
    assert found.smm


def test_earlier_directory_hides_and_replaces(shelf: Shelf) -> None:
    shelf.put("50-a")
    shelf.put("60-b")
    (shelf.directories[0] / "50-a.json").touch()
    assert shelf.find() == "60-b"
    shelf.put("70-c", place=0)
    assert shelf.find() == "60-b"


@pytest.mark.parametrize(
    "changes",
    [
        {"interface-types": ["bios"]},
        {"targets": [{"architecture": "aarch64", "machines": ["virt-*"]}]},
        {"targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*"]}]},
        {"mapping": {"device": "memory", "filename": "/x"}},
        {"features": "nonsense"},
    ],
)
def test_unsuitable_or_damaged_is_passed_over(shelf: Shelf, changes: dict[str, Any]) -> None:
    shelf.put("10-bad", **changes)
    with pytest.raises(UnsupportedError, match="no UEFI firmware for x86_64"):
        shelf.find()
    shelf.put("20-good")
    assert shelf.find() == "20-good"


def test_file_that_is_missing(shelf: Shelf) -> None:
    shelf.put("10-gone")
    (shelf.base / "10-gone.code").unlink()
    with pytest.raises(UnsupportedError) as caught:
        shelf.find()
    assert caught.value.action == "install the package ovmf"


def test_board_without_uefi(shelf: Shelf) -> None:
    with pytest.raises(UnsupportedError):
        find_firmware("x86_64", Machine.MICROVM, secure_boot=False, directories=shelf.directories)
