"""Saving a guest's state while it goes on: nobody notices, and state and disks belong together."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.system.hypervisor.lab import Guest, Lab, eventually
from tests.system.hypervisor.test_suspend import begun, left
from undercroft.hypervisor import livesave, migration
from undercroft.hypervisor.branch import Branching
from undercroft.hypervisor.machine import RunState, suspended_plan
from undercroft.hypervisor.plan import DiskFormat, DiskLayer, PlanDisk
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import NoSpaceError, QmpError, TimeLimitError

SIZE = 16 << 20
# Writes a number into one block after the other, each durably before the next. ($i is the guest's
# memory: a disk of an earlier moment would have a gap where the guest goes on.)
WRITER = """{ (i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); printf %08d $i |
dd of=/dev/vda bs=512 seek=$i conv=notrunc,fsync 2>/dev/null; done; touch /tmp/over) & }"""
STOP = "touch /tmp/stop; while [ ! -e /tmp/over ]; do sleep 0.1; done"

# Changes 80 MB of its memory again and again.
BUSY = """{ (while [ ! -e /tmp/stop ]; do dd if=/dev/zero of=/tmp/x bs=1M count=40 2>/dev/null;
tr '\\000' x </tmp/x >/tmp/y; done; touch /tmp/over) & }""".replace("\n", " ")


@pytest.fixture
def stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a QEMU that misses changes of the memory."""
    monkeypatch.setattr(livesave, "_SEES_CHANGES", (99, 0, 0))


class Saved:
    """A guest with one disk, and the file that this is to be written to."""

    def __init__(self, lab: Lab, guest: Guest, lower: PlanDisk, upper: PlanDisk) -> None:
        self.lab = lab
        self.guest = guest
        self.lower = lower
        self.upper = upper

    @classmethod
    async def boot(cls, lab: Lab, **changes: object) -> Saved:
        lower = lab.disk("lower.qcow2", SIZE, node="lower", serial="one")
        guest = await lab.boot(disks=(lower,), **changes)
        await guest.settled()
        return cls(lab, guest, lower, over(lab, lower, "upper"))

    async def save(self, path: Path) -> float:
        return await self.guest.machine.save_live(path, (self.upper,))

    async def assert_as_before(self) -> None:
        machine = self.guest.machine
        assert machine.run_state is RunState.RUNNING
        assert await machine.branched((self.lower,))
        assert await self.guest.run("echo on") == "on"


def over(lab: Lab, lower: PlanDisk, name: str) -> PlanDisk:
    """A new disk over another one."""
    backing = DiskLayer(path=lower.path, format=DiskFormat.QCOW2, node=f"{name}-below")
    return lab.disk(f"{name}.qcow2", SIZE, node=name, serial="one", backing=(backing,))


async def written(guest: Guest) -> int:
    """How many blocks hold their number, without a gap."""
    await guest.run("dd if=/dev/vda bs=512 skip=1 count=20000 of=/tmp/all 2>/dev/null")
    await guest.run("tr -d '\\000' </tmp/all | fold -w 8 | sed 's,^0*,,' >/tmp/rows")
    assert await guest.run("awk '$1 != NR' /tmp/rows") == ""
    return int(await guest.run("awk 'END { print NR }' /tmp/rows"))


async def test_state_and_disks_are_of_one_moment(lab: Lab, tmp_path: Path) -> None:
    saved = await Saved.boot(lab)
    guest, path = saved.guest, tmp_path / "memory"
    await guest.run(" ".join(WRITER.split("\n")))
    await asyncio.sleep(1)
    lab.events.clear()
    stood = await saved.save(path)
    assert stood > 0
    # Nobody was told of a pause.
    assert [event.state for event in lab.events if event.kind == "state"] == []
    assert guest.machine.run_state is RunState.RUNNING
    assert guest.machine.plan.disks == (saved.upper,)
    assert left(path) == {"memory", "memory.plan"}
    await guest.run(STOP)
    count = await written(guest)

    plan = suspended_plan(path)
    again = str(uuid.uuid4())
    plan = msgspec.structs.replace(
        plan,
        id=again,
        incoming=str(path),
        directory=str(lab.base / "vms" / again),
        run_directory=str(lab.base / "run" / "vms" / again),
        disks=(over(lab, saved.lower, "other"),),
    )
    machine = await lab.start(plan)
    other = await lab.back_at(machine)
    await other.run(STOP)
    assert await written(other) > 0
    assert await written(guest) == count  # what the one writes is not seen by the other


async def test_it_can_be_done_again_and_between_other_saves(lab: Lab, tmp_path: Path) -> None:
    saved = await Saved.boot(lab)
    machine = saved.guest.machine
    await saved.save(tmp_path / "one")
    await machine.pause()
    await machine.save_memory(tmp_path / "two")
    await machine.resume()
    await eventually(lambda: machine.run_state is RunState.RUNNING)
    await machine.save_live(tmp_path / "three", (over(lab, saved.upper, "third"),))
    assert await saved.guest.run("echo on") == "on"
    await machine.suspend(tmp_path / "four")


async def test_a_guest_that_changes_all_its_memory_is_saved_too(lab: Lab, tmp_path: Path) -> None:
    saved = await Saved.boot(lab)
    guest = saved.guest
    await guest.run(BUSY)
    await asyncio.sleep(1)
    await saved.save(tmp_path / "memory")
    assert guest.machine.run_state is RunState.RUNNING
    await guest.run(STOP)


async def test_a_guest_whose_changes_qemu_misses_stands_still(
    lab: Lab, tmp_path: Path, stands_still: None
) -> None:
    saved = await Saved.boot(lab)
    guest = saved.guest
    await guest.run(" ".join(WRITER.split("\n")))
    await asyncio.sleep(1)
    lab.events.clear()
    assert await saved.save(tmp_path / "memory") > 0
    assert [event.state for event in lab.events if event.kind == "state"] == []
    await guest.run(STOP)
    assert await written(guest) > 0
    done = await guest.machine._monitor.execute("query-migrate")
    assert done["ram"]["dirty-sync-count"] <= 3  # nothing was written twice


async def test_a_guest_that_is_never_caught_up_with_is_saved_too(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file does not grow without end, and the guest goes on afterwards."""
    monkeypatch.setattr(migration, "_UNLIMITED", 40 << 20)
    monkeypatch.setattr(livesave, "_STANDSTILL", 1)
    monkeypatch.setattr(livesave, "_MOST_PASSES", 2)
    saved = await Saved.boot(lab)
    guest = saved.guest
    await guest.run(BUSY)
    await asyncio.sleep(1)
    await saved.save(tmp_path / "memory")
    assert guest.machine.run_state is RunState.RUNNING
    done = await guest.machine._monitor.execute("query-migrate")
    assert done["ram"]["dirty-sync-count"] <= 7
    await guest.run(STOP)


async def test_qemu_that_hangs_over_it(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether the guest stands still then: it can be told to go on."""
    saved = await Saved.boot(lab)
    machine = saved.guest.machine
    commit, execute = Branching.commit, Monitor.execute

    async def hang(branching: Branching) -> None:
        await commit(branching)
        os.kill(machine.instance.pid, signal.SIGSTOP)

    async def impatient(
        self: Monitor, command: str, arguments: Mapping[str, Any] | None = None
    ) -> Any:
        return await execute(self, command, arguments, timeout=0.5)

    with monkeypatch.context() as patch:
        patch.setattr(Branching, "commit", hang)
        patch.setattr(Monitor, "execute", impatient)
        with pytest.raises(TimeLimitError):
            await saved.save(tmp_path / "memory")
    assert machine.run_state.value == "paused"
    os.kill(machine.instance.pid, signal.SIGCONT)
    await machine.stop_saving()
    if machine.run_state.value == "paused":
        await machine.resume()
    assert machine.run_state.value == "running"
    assert await saved.guest.run("echo on") == "on"
    await saved.save(tmp_path / "memory")


async def test_no_space_while_it_stands_still(
    lab: Lab, small_disk: Path, stands_still: None
) -> None:
    await test_no_space(lab, small_disk)


async def test_cancelled_while_it_stands_still(
    lab: Lab, tmp_path: Path, stands_still: None
) -> None:
    await test_cancelled(lab, tmp_path)


async def test_no_space(lab: Lab, small_disk: Path) -> None:
    saved = await Saved.boot(lab)
    path = small_disk / "memory"
    with pytest.raises(NoSpaceError):
        await saved.save(path)
    assert left(path) == set()
    await saved.assert_as_before()


async def test_cancelled(lab: Lab, tmp_path: Path) -> None:
    saved = await Saved.boot(lab)
    path = tmp_path / "memory"
    saving = asyncio.create_task(saved.save(path))
    await begun(path)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert left(path) == set()
    await saved.assert_as_before()
    await saved.save(path)  # and then it can be done


async def test_saver_killed_in_the_middle(lab: Lab, tmp_path: Path) -> None:
    """QEMU waits where it is; whoever takes over has it go on."""
    saved = await Saved.boot(lab)
    machine = saved.guest.machine
    await saved.guest.session.close()
    path = tmp_path / "memory"
    saving = asyncio.create_task(saved.save(path))
    await begun(path)
    await machine.detach()
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, it ends
        await saving
    again = await lab.adopt(machine)
    await again.stop_saving()
    await eventually(lambda: again.run_state is RunState.RUNNING)
    guest = await lab.back_at(again)
    disks = (saved.upper,) if not await again.branched((saved.upper,)) else again.plan.disks
    await again.save_live(path, disks)
    assert await guest.run("echo on") == "on"


async def test_one_that_nobody_follows_any_more_goes_on_when_it_is_told_to(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = await Saved.boot(lab)
    machine = saved.guest.machine
    await saved.guest.session.close()

    async def die(branching: Branching) -> None:
        await machine.detach()
        raise QmpError("the daemon is gone")

    monkeypatch.setattr(Branching, "commit", die)
    with pytest.raises(QmpError):
        await saved.save(tmp_path / "memory")
    again = await lab.adopt(machine)
    assert again.run_state is RunState.PAUSED
    await again.resume()
    guest = await lab.back_at(again)
    assert await guest.run("echo on") == "on"


async def test_a_paused_guest_is_saved_twice_with_the_disks_that_it_has(
    lab: Lab, tmp_path: Path
) -> None:
    """It does not go on after they have branched off: that would be in its memory only."""
    saved = await Saved.boot(lab)
    machine = saved.guest.machine
    await machine.pause()
    await machine.save_memory(tmp_path / "one")
    await machine.make_savable()
    lab.events.clear()
    await machine.branch((saved.upper,))
    await machine.save_memory(tmp_path / "two")
    states = [event.state for event in lab.events if event.kind == "state"]
    assert RunState.RUNNING not in states
    await machine.resume()
    assert await saved.guest.run("echo on") == "on"
