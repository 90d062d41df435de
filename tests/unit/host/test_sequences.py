"""Operations, actors and accidents in any order: whatever was asked and whatever went wrong, in the
end every VM is what it should be, none ever ran twice, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.unit.host.rig import FakeMachine, Rig, refused, rigged
from undercroft.model.errors import (
    AlreadyExistsError,
    BusyError,
    NotFoundError,
    WrongStateError,
)
from undercroft.model.layer import Layer
from undercroft.model.requests import StopRequest, VMChange, VMCreate
from undercroft.model.task import Task
from undercroft.model.units import GiB
from undercroft.model.vm import VM, Power, RestartPolicy, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM

T = TypeVar("T")
PATIENCE = 10.0  # seconds; all delays are shorter than one
NAMES = st.sampled_from(["a", "b"])
VERBS = st.sampled_from(["start", "stop", "restart", "reset", "pause", "resume", "suspend"])
HOOKS = ("start", "create_volume", "pause", "resume", "reset", "quit", "suspend", "power_button")
STATES = {
    Power.RUNNING: VMState.RUNNING,
    Power.STOPPED: VMState.STOPPED,
    Power.PAUSED: VMState.PAUSED,
    Power.SUSPENDED: VMState.SUSPENDED,
}


class Accidents(RuleBasedStateMachine):
    """Two names, one daemon after another."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.context = rigged(self.directory, self.patch)
        self.rig: Rig = self.run(self.context.__aenter__())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        async def settle_and_close() -> None:
            try:
                await self.settled()
            finally:
                await self.context.__aexit__(None, None, None)

        try:
            self.run(settle_and_close())
        finally:
            self.patch.undo()
            self.runner.close()
            shutil.rmtree(self.directory)

    def ask(self, work: Coroutine[Any, Any, Any], moments: int = 0) -> None:
        """A request, and that many moments for the host to act on it."""

        async def asking() -> None:
            with contextlib.suppress(AlreadyExistsError, NotFoundError, WrongStateError, BusyError):
                await work
            await pass_moments(moments)

        self.run(asking())

    @initialize(slow=st.booleans())
    def speed(self, slow: bool) -> None:
        """Whether calls of the hypervisor take a while, so that others come in between."""

        async def linger() -> None:
            await pass_moments(3)

        if slow:
            self.rig.hypervisor.hooks.update(dict.fromkeys(HOOKS, linger))

    @rule(
        name=NAMES,
        start=st.booleans(),
        policy=st.sampled_from(RestartPolicy),
        moments=st.integers(0, 20),
    )
    def create(self, name: str, start: bool, policy: RestartPolicy, moments: int) -> None:
        request = VMCreate(name=name, disk=GiB, start=start, restart=policy)
        self.ask(self.rig.world.operations.vms.create(SYSTEM, request), moments)

    @rule(name=NAMES, verb=VERBS, force=st.booleans(), moments=st.integers(0, 20))
    def switch(self, name: str, verb: str, force: bool, moments: int) -> None:
        arguments = (StopRequest(force=force),) if verb in ("stop", "restart") else ()
        self.ask(getattr(self.rig.world.operations.vms, verb)(SYSTEM, name, *arguments), moments)

    @rule(name=NAMES, new=NAMES)
    def rename(self, name: str, new: str) -> None:
        self.ask(self.rig.world.operations.vms.set(SYSTEM, name, VMChange(name=new)))

    @rule(name=NAMES, moments=st.integers(0, 20))
    def remove(self, name: str, moments: int) -> None:
        self.ask(self.rig.world.operations.vms.remove(SYSTEM, name, force=True), moments)

    @rule(last=st.integers(0, 3), moments=st.integers(0, 20))
    def cancel(self, last: int, moments: int) -> None:
        tasks = sorted(self.run(self.rig.world.all(Task)), key=lambda task: -task.meta.created)
        if last < len(tasks):
            id = tasks[last].meta.id
            self.ask(self.rig.world.operations.tasks.cancel(SYSTEM, id), moments)

    @rule(hint=st.sampled_from(["error", "signal", "guest-shutdown", "guest-panic"]))
    def machine_ends(self, hint: str) -> None:

        async def end() -> None:
            for machine in self.living()[-1:]:
                machine.ends(hint)

        self.run(end())

    @rule()
    def next_start_fails(self) -> None:
        self.rig.hypervisor.failures[:] = [refused()]

    @rule()
    def daemon_is_replaced(self) -> None:
        async def replace() -> None:
            await self.rig.close()
            adoptable = self.rig.hypervisor.adoptable
            adoptable.clear()
            for machine in self.rig.hypervisor.machines:
                if not machine.over:
                    adoptable[machine.plan.id] = machine
                    directory = self.rig.environment.run_directory(machine.plan.id)
                    directory.mkdir(parents=True, exist_ok=True)
                    (directory / "qmp.sock").touch()
            await self.rig.again()

        self.run(replace())

    def living(self) -> list[FakeMachine]:
        return [machine for machine in self.rig.hypervisor.machines if not machine.over]

    @rule()
    def peace(self) -> None:
        self.run(self.settled())

    async def settled(self) -> None:
        """Nothing more happens; everything is as it should be."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not await self.quiet():
                    await asyncio.sleep(0.005)
        assert await self.quiet(), await self.rig.world.all(VM)
        await self.rig.world.check_invariants()
        vms: dict[str, VM] = {vm.meta.id: vm for vm in await self.rig.world.all(VM)}
        assert len(self.living()) == len({machine.plan.id for machine in self.living()})
        for id, vm in vms.items():
            assert (vm.status.instance is not None) == vm.status.state.alive
            saved = self.rig.environment.suspended_path(id).exists()
            assert saved == (vm.status.state is VMState.SUSPENDED)
        data = self.rig.environment.data
        there = {path.name for path in (data / "vms").iterdir()}
        assert there == set(vms), (
            there - set(vms),
            set(vms) - there,
            await self.rig.world.all(Task),
        )
        heads = {volume.status.head for volume in await self.rig.world.all(Volume)}
        assert {path.stem for path in (data / "volumes").iterdir()} == heads
        assert {layer.meta.id for layer in await self.rig.world.all(Layer)} == heads
        for task in await self.rig.world.all(Task):
            assert task.status.state.final

    async def quiet(self) -> bool:
        vms: list[VM] = await self.rig.world.all(VM)
        if any(vm.tasks or vm.status.state is not STATES[vm.spec.power] for vm in vms):
            return False
        alive = {vm.meta.id for vm in vms if vm.status.state.alive}
        if alive != {machine.plan.id for machine in self.living()}:
            return False
        actors = self.rig.actors.values()
        return all(actor.machine or not actor.accounts_for_process for actor in actors)


async def pass_moments(count: int) -> None:
    """Lets others act."""
    for _ in range(count):
        await asyncio.sleep(0)


TestAccidents = Accidents.TestCase
TestAccidents.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
