"""Machines outlive who started them, and are found again; nothing else is taken for them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.system.hypervisor.lab import BOOT_LIMIT, Guest, Lab, eventually
from undercroft.hypervisor import sockets
from undercroft.hypervisor.machine import QemuMachine, RunState
from undercroft.hypervisor.plan import MachinePlan, encode_plan
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import QmpError, TimeLimitError
from undercroft.model.vm import Instance

NOBODY = 65534


class Spawner:
    """A process that starts a machine, as a daemon would."""

    def __init__(self, plan: MachinePlan, user: int | None = None) -> None:
        self.plan = plan
        self.user = user
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> Instance:
        path = Path(self.plan.directory).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_plan(self.plan))
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.system.hypervisor.spawner",
            str(path),
            *([] if self.user is None else [str(self.user)]),
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(BOOT_LIMIT):
            line = await self.process.stdout.readline()
        return msgspec.json.decode(line, type=Instance)

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@pytest.fixture
async def spawner(lab: Lab) -> AsyncIterator[Spawner]:
    spawner = Spawner(lab.plan())
    yield spawner
    await spawner.kill()


async def adopt(lab: Lab, plan: MachinePlan, instance: Instance | None) -> QemuMachine | None:
    machine = await QemuMachine.adopt(
        instance, Path(plan.run_directory), Path(plan.directory), on_event=lab.events.append
    )
    return lab.keep(machine) if machine is not None else None


async def test_taken_over_after_a_kill(lab: Lab, spawner: Spawner) -> None:
    instance = await spawner.start()
    log = Path(spawner.plan.directory) / "console.log"
    await eventually(lambda: log.exists() and b"~# " in log.read_bytes(), BOOT_LIMIT)
    await spawner.kill()

    machine = await adopt(lab, spawner.plan, instance)
    assert machine is not None
    assert machine.instance == instance
    assert machine.run_state is RunState.RUNNING
    assert machine.plan.memory == spawner.plan.memory
    guest = Guest(machine, await machine.console.attach(4096))
    await guest.until(b"ready")  # said to the one who was killed
    await guest.type("")
    await guest.until(b"# ")
    await guest.settled()
    assert await guest.run("echo $((6*7))") == "42"
    assert machine.agent is not None
    await eventually(machine.agent.ping)
    await machine.power_button()
    report = await guest.ended()
    assert report.hint == "guest-shutdown"
    assert not Path(spawner.plan.run_directory).exists()


async def test_found_without_having_been_written_down(lab: Lab, spawner: Spawner) -> None:
    instance = await spawner.start()
    await spawner.kill()
    machine = await adopt(lab, spawner.plan, None)
    assert machine is not None
    found = machine.instance
    assert (found.pid, found.start_ticks) == (instance.pid, instance.start_ticks)
    assert found.qemu == lab.emulator.version_text


async def test_what_happened_meanwhile_is_learnt(lab: Lab) -> None:
    """The guest switched itself off while nobody watched: QEMU stayed to tell."""
    guest = await lab.boot()
    machine = guest.machine
    await guest.type("sleep 2; poweroff -f")
    await guest.until(b"poweroff -f")
    await machine.detach()
    await eventually(lambda: qemu_status(machine, "shutdown"), BOOT_LIMIT)
    again = await adopt(lab, machine.plan, machine.instance)
    assert again is not None
    async with asyncio.timeout(BOOT_LIMIT):
        report = await again.wait_exit()
    assert (report.hint, report.code) == ("guest-shutdown", 0)


async def qemu_status(machine: QemuMachine, wanted: str) -> bool:
    """Asks QEMU itself, as a passer-by."""
    monitor = Monitor("test", lambda event: None, lambda: None)
    await monitor.connect(
        sockets.connect(Path(machine.plan.run_directory) / "qmp.sock"), timeout=60
    )
    status = (await monitor.execute("query-status"))["status"]
    await monitor.close()
    return bool(status == wanted)


async def test_killed_after_adoption(lab: Lab, spawner: Spawner) -> None:
    """Not our child: how it ended is known from elsewhere, or said to be unknown."""
    instance = await spawner.start()
    await spawner.kill()
    machine = await adopt(lab, spawner.plan, instance)
    assert machine is not None
    os.kill(instance.pid, signal.SIGKILL)
    async with asyncio.timeout(BOOT_LIMIT):
        report = await machine.wait_exit()
    assert (report.hint, report.signal) in (("signal", signal.SIGKILL), ("unknown", None))


async def test_dead_is_not_adopted(lab: Lab, spawner: Spawner) -> None:
    instance = await spawner.start()
    await spawner.kill()
    os.kill(instance.pid, signal.SIGKILL)
    await eventually(lambda: not alive(instance.pid))
    assert await adopt(lab, spawner.plan, instance) is None
    assert await adopt(lab, spawner.plan, None) is None


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text[text.rindex(")") + 2] not in "ZX"


@pytest.mark.parametrize(
    "changes",
    [{"start_ticks": 1}, {"host_boot": "other"}, {"pid": os.getpid()}, {"pid": 0}, {"pid": -1}],
)
async def test_reused_pid_fools_nobody(lab: Lab, changes: dict[str, Any]) -> None:
    machine = await lab.start()
    other = msgspec.structs.replace(machine.instance, **changes)
    assert await adopt(lab, machine.plan, other) is None
    assert machine.run_state is RunState.RUNNING


async def test_nothing_there(lab: Lab, tmp_path: Path) -> None:
    assert await QemuMachine.adopt(None, tmp_path / "none", tmp_path) is None
    plan = lab.plan()
    run = Path(plan.run_directory)
    run.mkdir(parents=True)
    (run / "plan.json").write_bytes(b"{}")
    assert await adopt(lab, plan, None) is None


async def test_alive_but_out_of_reach_is_not_called_dead(lab: Lab) -> None:
    machine = await lab.start()
    (Path(machine.plan.run_directory) / "plan.json").unlink()
    with pytest.raises(QmpError, match="cannot be taken over"):
        await adopt(lab, machine.plan, machine.instance)
    assert machine.run_state is RunState.RUNNING


async def test_stuck_qemu_is_said_to_be_there(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped from outside, it does not answer; it must not be taken for dead."""
    machine = await lab.start()
    await machine.detach()
    monkeypatch.setattr("undercroft.hypervisor.machine._ADOPT_TIMEOUT", 1.0)
    os.kill(machine.instance.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeLimitError):
            await adopt(lab, machine.plan, machine.instance)
    finally:
        os.kill(machine.instance.pid, signal.SIGKILL)
        os.waitpid(machine.instance.pid, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
async def test_ordinary_user(tiny_image_dir: Path) -> None:
    """Without any privilege: no other uid to run as, nothing but the user's own directory."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        for file in ("kernel", "initrd"):
            shutil.copyfile(tiny_image_dir / file, base / file)
        os.chown(base, NOBODY, NOBODY)
        lab = await Lab.open(base, base)
        subprocess.run(["chmod", "-R", "a+rX", base], check=True)
        plan = lab.plan()
        for directory in ("vms", "run"):
            (base / directory).mkdir()
            os.chown(base / directory, NOBODY, NOBODY)
        spawner = Spawner(plan, NOBODY)
        try:
            instance = await spawner.start()
            assert instance.uid == NOBODY
            assert os.stat(f"/proc/{instance.pid}").st_uid == NOBODY
            log = Path(plan.directory) / "console.log"
            await eventually(lambda: log.exists() and b"ready" in log.read_bytes(), BOOT_LIMIT)
            await spawner.kill()
            machine = await adopt(lab, plan, instance)
            assert machine is not None
            assert (await machine.quit()).hint == "quit"
        finally:
            await spawner.kill()
            await lab.close()
