"""Actors: machines that end by themselves."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.host.acting import blocked, events, running
from tests.unit.host.rig import Rig, refused
from undercroft.host import exits
from undercroft.model.errors import QmpError
from undercroft.model.requests import StopRequest
from undercroft.model.task import TaskState
from undercroft.model.vm import ExitReason, Power, RestartPolicy, VMState
from undercroft.operations.access import SYSTEM


async def test_what_crashes_is_started_again_and_counted(rig: Rig) -> None:
    machine = await running(rig)
    machine.ends("error", code=1, message="assertion failed")
    vm = await rig.until(
        "web1", lambda vm: vm.status.state is VMState.RUNNING and vm.status.restarts == 1
    )
    assert vm.status.instance == rig.hypervisor.machine.instance
    assert vm.spec.power is Power.RUNNING
    assert vm.status.last_exit is not None
    assert vm.status.last_exit.reason is ExitReason.CRASHED
    types = await events(rig)
    assert types[-2:] == ["vm.crashed", "vm.restarted"]


async def test_restarts_have_a_limit(rig: Rig) -> None:
    await running(rig)
    for counted in range(1, exits.MAX_RESTARTS + 1):
        rig.hypervisor.machine.ends("error", code=1)
        await rig.until("web1", lambda vm: vm.status.restarts == counted)  # noqa: B023
        await rig.state("web1", VMState.RUNNING)
    rig.hypervisor.machine.ends("error", code=1)
    vm = await rig.until("web1", lambda vm: vm.spec.power is Power.STOPPED)
    assert vm.status.state is VMState.STOPPED
    await asyncio.sleep(0.05)
    assert len(rig.hypervisor.machines) == exits.MAX_RESTARTS + 1
    await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    assert (await rig.world.vm("web1")).status.restarts == 0


async def test_starts_that_fail_count_too(rig: Rig) -> None:
    machine = await running(rig)
    rig.hypervisor.failures = [refused() if n % 2 else ValueError("odd") for n in range(20)]
    machine.ends("error", code=1)
    vm = await rig.until("web1", lambda vm: vm.spec.power is Power.STOPPED)
    assert vm.status.state is VMState.STOPPED
    assert len(rig.hypervisor.failures) == 20 - exits.MAX_RESTARTS
    assert (await events(rig)).count("vm.restart.failed") == exits.MAX_RESTARTS


@pytest.mark.parametrize(
    ("policy", "hint", "again"),
    [
        (RestartPolicy.NEVER, "error", False),
        (RestartPolicy.ON_FAILURE, "guest-shutdown", False),
        (RestartPolicy.ON_FAILURE, "guest-panic", True),
        (RestartPolicy.ALWAYS, "guest-shutdown", True),
    ],
)
async def test_the_policy_decides(rig: Rig, policy: RestartPolicy, hint: str, again: bool) -> None:
    machine = await running(rig, restart=policy)
    machine.ends(hint)
    if again:
        await rig.until("web1", lambda vm: vm.status.restarts == 1)
        await rig.state("web1", VMState.RUNNING)
    else:
        vm = await rig.until("web1", lambda vm: vm.spec.power is Power.STOPPED)
        assert vm.status.state is VMState.STOPPED
        assert len(rig.hypervisor.machines) == 1


async def test_what_was_paused_is_not_started_by_a_crash(rig: Rig) -> None:
    machine = await running(rig)
    await rig.final(await rig.world.operations.vms.pause(SYSTEM, "web1"))
    machine.ends("error", code=1)
    vm = await rig.until("web1", lambda vm: vm.spec.power is Power.STOPPED)
    assert vm.status.state is VMState.STOPPED
    assert len(rig.hypervisor.machines) == 1


async def test_it_ends_during_a_task(rig: Rig) -> None:
    machine = await running(rig)

    async def crash() -> None:
        machine.ends("error", code=1)
        raise QmpError("its monitor went away")

    rig.hypervisor.hooks["reset"] = crash
    task = await rig.final(await rig.world.operations.vms.reset(SYSTEM, "web1"))
    assert task.status.state is TaskState.FAILED
    vm = await rig.until("web1", lambda vm: vm.status.restarts == 1)
    vm = await rig.state("web1", VMState.RUNNING)
    assert vm.status.instance == rig.hypervisor.machine.instance
    assert len(rig.hypervisor.machines) == 2


async def test_it_crashes_while_it_is_asked_to_stop(rig: Rig) -> None:
    machine = await running(rig)

    async def crash() -> None:
        machine.ends("signal", signal=11)
        raise QmpError("its monitor went away")

    rig.hypervisor.hooks["power_button"] = crash
    task = await rig.final(await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest()))
    assert task.status.state is TaskState.SUCCEEDED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.STOPPED, Power.STOPPED)
    assert vm.status.last_exit is not None
    assert vm.status.last_exit.reason is ExitReason.CRASHED
    await asyncio.sleep(0.03)
    assert len(rig.hypervisor.machines) == 1


async def test_a_stop_that_comes_while_it_starts_again(rig: Rig) -> None:
    machine = await running(rig)
    began, go = blocked(rig, "start")
    machine.ends("error", code=1)
    await began.wait()
    task = await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest())
    await asyncio.sleep(0.02)
    go.set()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.STOPPED, Power.STOPPED)
    assert rig.hypervisor.alive == set()
    await asyncio.sleep(0.03)
    assert len(rig.hypervisor.machines) == 2


async def test_a_stop_that_comes_before_it_starts_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "backoff", lambda restarts: 60.0)
    machine = await running(rig)
    machine.ends("error", code=1)
    await rig.until("web1", lambda vm: vm.status.state is VMState.STOPPED)
    task = await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest())
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert (await rig.world.vm("web1")).spec.power is Power.STOPPED
    assert len(rig.hypervisor.machines) == 1


async def test_a_start_by_hand_does_not_wait_for_the_automatic_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "backoff", lambda restarts: 60.0)
    machine = await running(rig)
    machine.ends("error", code=1)
    await rig.until("web1", lambda vm: vm.status.state is VMState.STOPPED)
    task = await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    assert task.status.state is TaskState.SUCCEEDED
    assert (await rig.world.vm("web1")).status.restarts == 0
