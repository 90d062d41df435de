"""Starts that fail: said clearly, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.system.hypervisor.lab import Lab, open_descriptors, processes_mentioning
from undercroft.hypervisor.machine import QemuMachine
from undercroft.hypervisor.plan import DiskFormat, MachinePlan, PlanDisk, PlanForward, PlanPort
from undercroft.model.errors import QemuStartError
from undercroft.model.vm import PortMode


def port(number: int) -> PlanPort:
    forward = PlanForward(guest_port=22, host_port=number)
    return PlanPort(mac="52:54:00:00:00:01", mode=PortMode.RESTRICTED, forwards=(forward,))


async def failing(lab: Lab, plan: MachinePlan) -> QemuStartError:
    """The error; and that this process and the disk are as before."""
    before, files = open_descriptors(), lab.left_behind()
    with pytest.raises(QemuStartError) as caught:
        await lab.start(plan)
    assert len(open_descriptors()) == len(before)
    assert lab.left_behind() == files
    assert processes_mentioning(plan.uuid) == []
    assert caught.value.object == f"vm {plan.name}"
    return caught.value


async def test_port_taken(lab: Lab) -> None:
    await lab.start()  # the event loop and its threads have what they need from here on
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = await failing(lab, lab.plan(ports=(port(taken.getsockname()[1]),)))
    assert "forwarding" in error.message
    assert error.action is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel": "/nowhere/kernel"}, "/nowhere/kernel: No such file"),
        ({"cpu_model": "no-such-cpu"}, "no-such-cpu"),
        ({"machine_version": "99.0"}, "pc-q35-99.0"),
        ({"memory": 1 << 50}, "memory"),
        ({"disks": (PlanDisk(path="/dev/null", format=DiskFormat.QCOW2),)}, "a regular file"),
    ],
)
async def test_qemu_has_the_last_word(lab: Lab, changes: dict[str, Any], words: str) -> None:
    await lab.start()
    error = await failing(lab, lab.plan(**changes))
    assert words in error.message
    assert "waiting for connection" not in error.message


async def test_kernel_that_is_none(lab: Lab, tmp_path: Path) -> None:
    await lab.start()
    (tmp_path / "kernel").write_bytes(b"not a kernel" * 1000)
    error = await failing(lab, lab.plan(kernel=str(tmp_path / "kernel")))
    assert error.message


async def test_disk_in_use_elsewhere(lab: Lab) -> None:
    disk = lab.disk("disk.qcow2", 1 << 20)
    await lab.start(disks=(disk,))
    error = await failing(lab, lab.plan(disks=(disk,)))
    assert "lock" in error.message
    assert error.action == "another process has the disk open: stop it first"


async def test_program_that_is_not_qemu(lab: Lab) -> None:
    await lab.start()
    for path in ("/bin/true", "/nowhere/qemu"):
        lab.emulator = msgspec.structs.replace(lab.emulator, path=path)
        await failing(lab, lab.plan())


async def test_state_that_is_none(lab: Lab, tmp_path: Path) -> None:
    await lab.start()
    (tmp_path / "state").write_bytes(b"nonsense" * 1000)
    await failing(lab, lab.plan(incoming=str(tmp_path / "state")))


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.05])
async def test_cancelled_start_leaves_nothing(lab: Lab, delay: float) -> None:
    await lab.start()
    plan = lab.plan()
    before = open_descriptors()
    starting = asyncio.create_task(QemuMachine.start(plan, lab.emulator))
    await asyncio.sleep(delay)
    if starting.cancel():
        with pytest.raises(asyncio.CancelledError):
            await starting
    else:  # it was quicker
        await starting.result().quit()
    assert processes_mentioning(plan.uuid) == []
    assert len(open_descriptors()) == len(before)
    assert not Path(plan.run_directory).exists()


async def test_two_machines_with_one_disk_read_only(lab: Lab) -> None:
    """A shared image is no conflict."""
    path = lab.base / "image.raw"
    path.write_bytes(os.urandom(1 << 20))
    disk = PlanDisk(path=str(path), format=DiskFormat.RAW, read_only=True)
    await lab.start(disks=(disk,))
    await lab.start(disks=(disk,))
