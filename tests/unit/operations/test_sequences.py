"""Any sequence of operations on two names, with a host that does, fails or cancels tasks between:
names stay unique, claims match records, and no task is left that nobody will see to."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.operations.world import HOST, Services, World
from undercroft.model.errors import (
    AlreadyExistsError,
    BusyError,
    InUseError,
    NotFoundError,
    WrongStateError,
)
from undercroft.model.requests import StopRequest, VMChange, VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.units import GiB
from undercroft.model.vm import VM, Forward, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.vm_change import removal_releases
from undercroft.store.interface import Delete, Transaction
from undercroft.store.sqlite import SQLiteStore

T = TypeVar("T")
NAMES = st.sampled_from(["a", "b"])
HOST_PORT = st.sampled_from([0, 8080, 8081])
VERBS = st.sampled_from(["start", "stop", "restart", "reset", "pause", "resume", "suspend"])
AFTER = {
    "vm.create": VMState.STOPPED,
    "vm.start": VMState.RUNNING,
    "vm.stop": VMState.STOPPED,
    "vm.restart": VMState.RUNNING,
    "vm.reset": VMState.RUNNING,
    "vm.pause": VMState.PAUSED,
    "vm.resume": VMState.RUNNING,
    "vm.suspend": VMState.SUSPENDED,
}


class Sequences(RuleBasedStateMachine):
    """Two VMs, many requests."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        store = self.run(SQLiteStore.open(self.directory / "store.db"))
        self.world = World(store, Services(self.directory))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.world.store.close())
        self.runner.close()
        shutil.rmtree(self.directory)

    def ask(self, work: Coroutine[Any, Any, Any]) -> None:
        """A request, which may be refused, but only with an error meant for users."""
        with contextlib.suppress(
            AlreadyExistsError, NotFoundError, WrongStateError, BusyError, InUseError
        ):
            self.run(work)
        self.world.now += 1

    @rule(name=NAMES, start=st.booleans(), port=HOST_PORT)
    def create(self, name: str, start: bool, port: int) -> None:
        request = VMCreate(
            name=name,
            disk=GiB,
            start=start,
            forwards=(Forward(guest_port=80, host_port=port),),
        )
        self.ask(self.world.operations.vms.create(SYSTEM, request))

    @rule(name=NAMES, verb=VERBS, force=st.booleans())
    def switch(self, name: str, verb: str, force: bool) -> None:
        arguments = (StopRequest(force=force),) if verb in ("stop", "restart") else ()
        self.ask(getattr(self.world.operations.vms, verb)(SYSTEM, name, *arguments))

    @rule(name=NAMES, new=NAMES)
    def rename(self, name: str, new: str) -> None:
        self.ask(self.world.operations.vms.set(SYSTEM, name, VMChange(name=new)))

    @rule(name=NAMES, ports=st.lists(HOST_PORT, max_size=2, unique=True))
    def forward(self, name: str, ports: list[int]) -> None:
        change = VMChange(forwards=tuple(Forward(guest_port=80, host_port=p) for p in ports))
        self.ask(self.world.operations.vms.set(SYSTEM, name, change))

    @rule(name=NAMES, force=st.booleans())
    def remove(self, name: str, force: bool) -> None:
        self.ask(self.world.operations.vms.remove(SYSTEM, name, force))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        tasks = sorted(self.run(self.world.all(Task)), key=lambda task: task.meta.created)
        if tasks:  # in an order that is the same each time; ids are random
            id = data.draw(st.sampled_from([task.meta.id for task in tasks]), label="task")
            self.ask(self.world.operations.tasks.cancel(SYSTEM, id))

    @rule(name=NAMES, fails=st.booleans())
    def work(self, name: str, fails: bool) -> None:
        """The host takes the next task of a VM."""
        self.run(self._work(name, fails))

    async def _work(self, name: str, fails: bool) -> None:
        vms: list[VM] = [vm for vm in await self.world.all(VM) if vm.meta.name == name]
        if not vms or not vms[0].tasks:
            return
        vm, task = vms[0], await self.world.task(vms[0].tasks[0])
        if task.spec.verb == "vm.remove" and not fails:
            await self._gone(vm)
        elif task.spec.cancel or fails:
            await self.world.end(task.meta.id, TaskState.CANCELLED)
            await self.world.done(task)
            await self.world.end(task.meta.id, TaskState.CANCELLED)
        else:
            await self.world.done(task, AFTER[task.spec.verb])

    async def _gone(self, vm: VM) -> None:
        volumes: list[Volume] = [v for v in await self.world.all(Volume) if v.spec.vm == vm.meta.id]
        await self.world.store.transact(
            Transaction(
                deletes=[Delete(VM, vm.meta.id), *(Delete(Volume, v.meta.id) for v in volumes)],
                releases=removal_releases(vm, volumes),
            )
        )
        for id in vm.tasks:
            await self.world.end(id, TaskState.SUCCEEDED)

    @invariant()
    def consistent(self) -> None:
        self.run(self.world.check_invariants())

    @invariant()
    def nothing_is_held_by_nobody(self) -> None:
        async def look() -> None:
            ids = {record.meta.id for kind in (VM, Volume) for record in await self.world.all(kind)}
            for scope, names in (
                ("vm/default", ["a", "b"]),
                ("volume/default", ["a-boot", "b-boot"]),
                (f"port/{HOST}", ["tcp/8080", "tcp/8081"]),
            ):
                for name in names:
                    holder = await self.world.store.resolve(scope, name)
                    assert holder is None or holder in ids

        self.run(look())


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
