"""Which accelerator guests get, also when looking for one goes wrong."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from undercroft.host import acceleration
from undercroft.host.acceleration import HostAcceleration
from undercroft.hypervisor.accelerator import Acceleration, AcceleratorReport
from undercroft.hypervisor.emulator import Emulator
from undercroft.model.errors import ProgramError

EMULATOR = Emulator(arch="x86_64", path="/nonexistent", version=(10, 0, 2))


def prepare(
    monkeypatch: pytest.MonkeyPatch, emulators: Any = (EMULATOR,), kvm: Any = True
) -> HostAcceleration:
    async def installed(cache: Path) -> Any:
        if isinstance(emulators, Exception):
            raise emulators
        return emulators

    async def probe(emulator: Emulator, cache: Path) -> Any:
        if isinstance(kvm, Exception):
            raise kvm
        return Acceleration(
            kvm=AcceleratorReport(name="kvm", available=kvm, reason="", code="works"),
            tcg=AcceleratorReport(name="tcg", available=True, reason="", code="works"),
            qemu="qemu",
            qemu_version=(10, 0, 2),
            probed=1.0,
            duration=1.0,
        )

    monkeypatch.setattr(acceleration, "installed_emulators", installed)
    monkeypatch.setattr(acceleration, "probe", probe)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    made = HostAcceleration(Path("/nonexistent"))
    made.begin()
    return made


@pytest.mark.parametrize(
    ("kvm", "arch", "chosen"),
    [
        (True, "x86_64", "kvm"),
        (True, "i386", "kvm"),
        (True, "aarch64", "tcg"),
        (False, "x86_64", "tcg"),
        (ProgramError("probe broke"), "x86_64", "tcg"),
        (OSError(5, "odd"), "x86_64", "tcg"),
    ],
)
async def test_choice(monkeypatch: pytest.MonkeyPatch, kvm: Any, arch: str, chosen: str) -> None:
    host = prepare(monkeypatch, kvm=kvm)
    assert await host.choose(arch) == chosen
    await host.close()


async def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    host = prepare(monkeypatch, emulators=())
    assert await host.choose("x86_64") == "tcg"
    assert await host.statuses() == ()
    assert await host.emulators() == ()
    await host.close()


async def test_before_it_looked() -> None:
    host = HostAcceleration(Path("/nonexistent"))
    assert await host.choose("x86_64") == "tcg"
    assert await host.emulators() == ()
    await host.close()
