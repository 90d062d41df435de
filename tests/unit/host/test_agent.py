"""The agent as a whole: start, adoption, following the store, gaps, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tests.unit.host.rig import FakeMachine, Rig
from tests.unit.operations.world import HOST
from undercroft.host import agent as agent_module
from undercroft.host.agent import HostAgent
from undercroft.model.errors import QmpError, UnavailableError
from undercroft.model.requests import StopRequest, VMCreate
from undercroft.model.task import TaskState
from undercroft.model.units import GiB
from undercroft.model.vm import VM, VMState
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import new_task
from undercroft.store.interface import Delete, Put, Transaction, update


class Daemons:
    """One agent after another on the same data."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.agent: HostAgent | None = None

    async def start(self) -> HostAgent:
        self.rig.environment.closing = False
        self.agent = HostAgent(self.rig.environment)
        await self.agent.start()
        return self.agent

    async def close(self) -> None:
        if self.agent is not None:
            async with asyncio.timeout(10):
                await self.agent.close()
            self.agent = None

    async def running(self, name: str = "web1") -> FakeMachine:
        request = VMCreate(name=name, start=True, disk=GiB)
        task = await self.rig.world.operations.vms.create(SYSTEM, request)
        assert (await self.rig.final(task)).status.state is TaskState.SUCCEEDED
        machine = self.rig.hypervisor.machine
        directory = self.rig.environment.run_directory(machine.plan.id)
        (directory / "qmp.sock").touch()
        self.rig.hypervisor.adoptable[machine.plan.id] = machine
        return machine


@pytest.fixture
async def daemons(rig: Rig) -> AsyncIterator[Daemons]:
    await rig.close()  # the agent is to do it all
    rig.environment.directory.lock()
    made = Daemons(rig)
    yield made
    await made.close()
    rig.environment.directory.unlock()


async def test_from_start_to_end(daemons: Daemons) -> None:
    agent = await daemons.start()
    machine = await daemons.running()
    assert agent.machine(machine.plan.id) is machine  # type: ignore[comparison-overlap]
    await daemons.close()
    assert machine.detached
    assert machine.calls == []
    agent = await daemons.start()
    assert agent.machine(machine.plan.id) is machine  # type: ignore[comparison-overlap]
    task = await daemons.rig.world.operations.vms.remove(SYSTEM, "web1", force=True)
    await daemons.rig.final(task)
    async with asyncio.timeout(10):
        while agent.machine(machine.plan.id) is not None or agent._actors:
            await asyncio.sleep(0.002)


async def test_one_that_does_not_answer_does_not_keep_the_daemon_from_starting(
    daemons: Daemons,
) -> None:
    await daemons.start()
    silent = await daemons.running("web1")
    await daemons.running("web2")
    await daemons.close()
    for failure in (QmpError("no"), ConnectionRefusedError()):
        daemons.rig.hypervisor.adoptable[silent.plan.id] = failure
        agent = await daemons.start()
        assert silent.plan.id in agent._owned()
        task = await daemons.rig.world.operations.vms.pause(SYSTEM, "web2")
        assert (await daemons.rig.final(task)).status.state is TaskState.SUCCEEDED
        await daemons.rig.final(await daemons.rig.world.operations.vms.resume(SYSTEM, "web2"))
        await daemons.close()
    assert len(daemons.rig.hypervisor.machines) == 2


async def test_tasks_that_nobody_can_carry_out_are_ended(daemons: Daemons) -> None:
    await daemons.start()
    await daemons.running()
    await daemons.close()
    vm = await daemons.rig.world.vm("web1")
    gone = msgspec.structs.replace(vm, meta=msgspec.structs.replace(vm.meta, id="vm-" + "0" * 16))
    lost = [new_task(daemons.rig.world.context, "vm.start", who, "me") for who in (vm, gone)]
    await daemons.rig.store.transact(Transaction(puts=[Put(task) for task in lost]))
    await daemons.start()
    for task in lost:
        ended = await daemons.rig.final(task)
        assert ended.status.state is TaskState.FAILED


async def test_things_half_made_are_swept(daemons: Daemons) -> None:
    (daemons.rig.environment.tmp / "half").write_bytes(b"x")
    await daemons.start()
    assert list(daemons.rig.environment.tmp.iterdir()) == []


async def test_vms_of_other_hosts_are_none_of_ours(daemons: Daemons) -> None:
    agent = await daemons.start()
    vm = await daemons.rig.world.created("other")
    await daemons.close()
    elsewhere = msgspec.structs.replace(
        vm, spec=msgspec.structs.replace(vm.spec, host=HOST.replace("0", "1"))
    )
    await daemons.rig.store.transact(Transaction(puts=[Put(elsewhere)]))
    agent = await daemons.start()
    await update(
        daemons.rig.store,
        VM,
        vm.meta.id,
        lambda v: msgspec.structs.replace(
            v, meta=msgspec.structs.replace(v.meta, labels={"a": ""})
        ),
    )
    await asyncio.sleep(0.02)
    assert vm.meta.id not in agent._actors


async def follow_anew(daemons: Daemons, revision: int) -> None:
    """Follows from a revision on of which the history is gone."""
    await daemons.rig.store.compact(0)
    agent = daemons.agent
    assert agent is not None
    for task in [task for task in agent._background if task.get_name() == "follow"]:
        task.cancel()
        await asyncio.wait({task})
        agent._background.remove(task)
    agent._background.append(asyncio.create_task(agent._follow(revision), name="follow"))


async def test_what_changed_in_a_gap_is_seen(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await daemons.start()
    machine = await daemons.running()
    machine.deaf = True
    vms = daemons.rig.world.operations.vms
    stop = await vms.stop(SYSTEM, "web1", StopRequest(timeout=600))
    await daemons.rig.until("web1", lambda vm: vm.status.state is VMState.STOPPING)
    gone = await vms.create(SYSTEM, VMCreate(name="gone"))
    await daemons.rig.final(gone)
    with monkeypatch.context() as deaf:
        deaf.setattr(agent, "_on_change", lambda change: None)
        await daemons.rig.world.operations.tasks.cancel(SYSTEM, stop.meta.id)
        create = await vms.create(SYSTEM, VMCreate(name="web2"))
        await daemons.rig.store.transact(Transaction(deletes=[Delete(VM, gone.spec.object.id)]))
        await asyncio.sleep(0.02)
        assert not (await daemons.rig.world.task(create.meta.id)).status.state.final
        assert not (await daemons.rig.world.task(stop.meta.id)).status.state.final
    await follow_anew(daemons, 1)
    assert (await daemons.rig.final(stop)).status.state is TaskState.CANCELLED
    assert (await daemons.rig.final(create)).status.state is TaskState.SUCCEEDED
    assert gone.spec.object.id not in agent._actors


async def test_following_survives_a_fault(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await daemons.start()
    monkeypatch.setattr(agent_module, "RETRY_INTERVAL", 0.01)
    faults: list[Exception] = [ValueError("odd"), UnavailableError("away")]
    on_change = agent._on_change

    def faulty(change: Any) -> None:
        if faults:
            raise faults.pop(0)
        on_change(change)

    monkeypatch.setattr(agent, "_on_change", faulty)
    task = await daemons.rig.world.operations.vms.create(SYSTEM, VMCreate(name="web1"))
    assert (await daemons.rig.final(task)).status.state is TaskState.SUCCEEDED
    assert faults == []
