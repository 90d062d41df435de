"""A machine from start to end, and every way in which it can end."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.system.hypervisor.lab import Lab, eventually
from undercroft.hypervisor.machine import RunState
from undercroft.hypervisor.output import QEMU_LOG
from undercroft.hypervisor.process import boot_id
from undercroft.model.errors import UnsupportedError, WrongStateError
from undercroft.model.vm import Display, Machine


async def test_life_of_a_machine(lab: Lab) -> None:
    guest = await lab.boot()
    machine = guest.machine
    assert machine.instance.host_boot == boot_id()
    assert machine.instance.qemu == lab.emulator.version_text
    assert machine.plan.machine_version == "{}.{}".format(*lab.emulator.version)
    assert await guest.run("echo $((6*7))") == "42"
    stats = await machine.stats()
    assert stats.cpu_seconds > 0
    assert stats.memory > 32 << 20
    assert stats.guest_memory == machine.plan.memory

    await guest.settled()
    await machine.power_button()
    report = await guest.ended()
    assert (report.hint, report.code) == ("guest-shutdown", 0)
    assert machine.run_state is RunState.ENDED
    assert [event.state for event in lab.events if event.kind == "state"] == [
        RunState.SHUTDOWN,
        RunState.ENDED,
    ]
    assert not Path(machine.plan.run_directory).exists()
    assert (Path(machine.plan.directory) / "console.log").stat().st_size > 0


@pytest.mark.parametrize("board", [Machine.Q35, Machine.MICROVM])
async def test_agent_is_heard_and_shuts_down(lab: Lab, board: Machine) -> None:
    guest = await lab.boot(machine=board)
    agent = guest.machine.agent
    assert agent is not None
    await eventually(lambda: agent.ping())
    assert [event.data for event in lab.events if event.kind == "agent"][-1] == {"connected": True}
    await guest.machine.agent_shutdown()
    assert (await guest.ended()).hint == "guest-shutdown"


async def test_guest_that_ignores_the_power_button_can_be_ended(lab: Lab) -> None:
    guest = await lab.boot()
    await guest.settled()
    await guest.run("killall acpid")
    await guest.machine.power_button()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(guest.machine.wait_exit(), 3)
    assert await guest.run("echo still here") == "still here"
    report = await guest.machine.quit()
    assert (report.hint, report.code) == ("quit", 0)


async def test_pause_and_resume_are_guarded(lab: Lab) -> None:
    guest = await lab.boot()
    machine = guest.machine
    await machine.pause()
    assert machine.run_state is RunState.PAUSED
    with pytest.raises(WrongStateError) as caught:
        await machine.pause()
    assert caught.value.data == {"state": "paused", "needed": ["running"]}
    with pytest.raises(WrongStateError):
        await machine.power_button()
    await machine.resume()
    await eventually(lambda: machine.run_state is RunState.RUNNING)
    assert await guest.run("echo on") == "on"
    with pytest.raises(WrongStateError):
        await machine.resume()
    await machine.kill()
    with pytest.raises(WrongStateError) as caught:
        await machine.pause()
    assert caught.value.data["state"] == "ended"


async def test_reset_boots_again(lab: Lab) -> None:
    guest = await lab.boot()
    await guest.machine.reset()
    await guest.ready()
    assert guest.machine.run_state is RunState.RUNNING


async def test_reboot_from_within_is_no_end(lab: Lab) -> None:
    guest = await lab.boot()
    await guest.type("reboot -f")
    await guest.ready()
    assert "reset" in [event.kind for event in lab.events]
    assert guest.machine.run_state is RunState.RUNNING


async def test_killed_from_outside(lab: Lab) -> None:
    guest = await lab.boot()
    os.kill(guest.machine.instance.pid, signal.SIGKILL)
    report = await guest.ended()
    assert (report.hint, report.signal, report.code) == ("signal", signal.SIGKILL, None)
    assert not Path(guest.machine.plan.run_directory).exists()
    # The console's session ends with it.
    with pytest.raises(StopAsyncIteration):
        await guest.until(b"never")


async def test_terminated_from_outside(lab: Lab) -> None:
    machine = await lab.start()
    os.kill(machine.instance.pid, signal.SIGTERM)
    report = await machine.wait_exit()
    assert report.hint == "signal"
    assert "terminating on signal 15" in report.message
    log = (Path(machine.plan.directory) / QEMU_LOG).read_text()
    assert "terminating on signal 15" in log


async def test_killed_by_us(lab: Lab) -> None:
    machine = await lab.start()
    report = await machine.kill()
    assert (report.hint, report.signal) == ("killed", signal.SIGKILL)


@pytest.mark.parametrize("board", [Machine.Q35, Machine.MICROVM])
async def test_panic_is_told_apart(lab: Lab, board: Machine) -> None:
    guest = await lab.boot(machine=board)
    await guest.settled()
    await guest.type("echo c > /proc/sysrq-trigger")
    report = await guest.ended()
    assert (report.hint, report.code) == ("guest-panic", 0)
    assert RunState.PANICKED in [event.state for event in lab.events]


async def test_display_as_picture_and_over_vnc(lab: Lab) -> None:
    machine = await lab.start(display=Display.STD)
    assert (await machine.screenshot()).startswith(b"\x89PNG\r\n\x1a\n")
    with await machine.vnc() as viewer:
        loop = asyncio.get_running_loop()
        assert await asyncio.wait_for(loop.sock_recv(viewer, 12), 10) == b"RFB 003.008\n"
        assert (await machine.screenshot()).startswith(b"\x89PNG")
        with await machine.vnc() as second:
            assert await asyncio.wait_for(loop.sock_recv(second, 12), 10) == b"RFB 003.008\n"


async def test_no_display_is_said(lab: Lab) -> None:
    machine = await lab.start()
    with pytest.raises(UnsupportedError):
        await machine.screenshot()
    with pytest.raises(UnsupportedError):
        await machine.vnc()


async def test_letting_go_leaves_it_running(lab: Lab) -> None:
    machine = await lab.start()
    await machine.detach()
    pid = machine.instance.pid
    assert Path(f"/proc/{pid}/stat").exists()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
