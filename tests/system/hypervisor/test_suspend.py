"""Suspend to disk and resume: nothing lost, and nothing half done."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from tests.system.hypervisor.lab import Lab, eventually, fill
from undercroft.hypervisor.machine import QemuMachine, RunState, suspended_plan
from undercroft.hypervisor.state_file import discard_state
from undercroft.model.errors import DataCorruptError, NoSpaceError


def left(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.glob(path.name + "*")}


def held(machine: QemuMachine, path: Path) -> list[str]:
    """What a QEMU has open of the files of a state, removed ones among them."""
    files = [os.readlink(entry) for entry in Path(f"/proc/{machine.instance.pid}/fd").iterdir()]
    return [file for file in files if file.startswith(str(path))]


async def begun(path: Path) -> None:
    """Waits until the state is being written: without a pause, as a quick machine needs moments."""
    part = path.with_name(path.name + ".part")
    async with asyncio.timeout(60):
        while not part.exists():
            await asyncio.sleep(0)


async def test_round_trip(lab: Lab, tmp_path: Path) -> None:
    disk = lab.disk("disk.qcow2", 16 << 20)
    guest = await lab.boot(disks=(disk,))
    await guest.settled()
    await guest.run("echo kept > /tmp/memory; echo on''disk > /dev/vda; sync")
    path = tmp_path / "suspend.state"
    shares: list[float] = []
    report = await guest.machine.suspend(path, shares.append)
    assert report.hint == "suspended"
    assert left(path) == {"suspend.state", "suspend.state.plan"}
    assert all(0 <= share <= 1 for share in shares)

    plan = suspended_plan(path)
    assert plan.machine_version == guest.machine.plan.machine_version
    machine = await lab.start(msgspec.structs.replace(plan, incoming=str(path)))
    assert machine.run_state is RunState.RUNNING
    assert held(machine, path) == []
    guest = await lab.back_at(machine)
    assert await guest.run("cat /tmp/memory; head -n 1 /dev/vda") == "kept\r\nondisk"
    # It can be done again, also from a pause.
    await machine.pause()
    assert (await machine.suspend(path)).hint == "suspended"
    discard_state(path)
    assert left(path) == set()


async def test_no_space_for_the_state(lab: Lab, small_disk: Path) -> None:
    guest = await lab.boot()
    path = small_disk / "suspend.state"
    with pytest.raises(NoSpaceError):
        await guest.machine.suspend(path)
    assert left(path) == set()
    assert held(guest.machine, path) == []
    await eventually(lambda: guest.machine.run_state is RunState.RUNNING)
    assert await guest.run("echo on") == "on"


async def test_cancelled_goes_on(lab: Lab, tmp_path: Path) -> None:
    guest = await lab.boot()
    path = tmp_path / "suspend.state"
    suspending = asyncio.create_task(guest.machine.suspend(path))
    await begun(path)
    suspending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await suspending
    assert left(path) == set()
    await eventually(lambda: guest.machine.run_state is RunState.RUNNING)
    assert await guest.run("echo on") == "on"


async def test_suspender_killed_in_the_middle(lab: Lab, tmp_path: Path) -> None:
    """Whoever takes over finds a paused guest that can be resumed."""
    guest = await lab.boot()
    machine = guest.machine
    await guest.session.close()
    path = tmp_path / "suspend.state"
    suspending = asyncio.create_task(machine.suspend(path))
    await begun(path)
    await machine.detach()
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, it ends
        await suspending
    again = await lab.adopt(machine)
    assert again.run_state in (RunState.PAUSED, RunState.RUNNING)
    if again.run_state is RunState.PAUSED:
        await again.resume()
    guest = await lab.back_at(again)
    assert await guest.run("echo on") == "on"


@pytest.mark.parametrize("content", [None, b"", b"{}", b"nonsense"])
async def test_damaged_state_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "suspend.state"
    if content is not None:
        path.write_bytes(b"state")
        (tmp_path / "suspend.state.plan").write_bytes(content)
    with pytest.raises(DataCorruptError):
        suspended_plan(path)


async def test_host_without_space_pauses_the_guest(lab: Lab, small_disk: Path) -> None:
    """It goes on where it stopped once there is room; the guest sees no error."""
    disk = lab.disk("small/disk.qcow2", 64 << 20)
    guest = await lab.boot(disks=(disk,))
    await guest.settled()
    filler = fill(small_disk)
    await guest.type(
        "dd if=/dev/urandom of=/tmp/x bs=64k count=32 2> /dev/null; "
        "cp /tmp/x /dev/vda && sync && echo w''ritten"
    )
    machine = guest.machine
    await eventually(lambda: machine.run_state is RunState.IO_ERROR)
    events = [event.data for event in lab.events if event.kind == "io-error"]
    assert events[0]["no_space"] is True
    assert events[0]["operation"] == "write"
    filler.unlink()
    await machine.resume()
    await guest.until(b"written")
    await guest.until(b"# ")
    assert await guest.run("cmp -n 2097152 /tmp/x /dev/vda && echo s''ame") == "same"
    assert "error" not in await guest.run("dmesg | grep -i 'i/o error'; echo ok")
