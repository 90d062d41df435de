"""A store, a data directory, and machines that do as they are told without any QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.operations.world import HOST, Services, World
from undercroft.host import actor as actor_module
from undercroft.host import exits, power
from undercroft.host.actor import VMActor
from undercroft.host.environment import Environment
from undercroft.host.layers import head_layer
from undercroft.host.verbs import VM_VERBS
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.machine import ExitReport, MachineEvent, MachineStats, RunState
from undercroft.hypervisor.plan import DiskLayer, MachinePlan, PlanDisk
from undercroft.model.errors import (
    GuestAgentError,
    QemuStartError,
    QmpError,
    TimeLimitError,
    UndercroftError,
    WrongStateError,
)
from undercroft.model.task import Task
from undercroft.model.vm import VM, Instance, VMState
from undercroft.operations.access import SYSTEM
from undercroft.store.datadir import DataDirectory
from undercroft.store.interface import Store, Transaction
from undercroft.store.sqlite import SQLiteStore


class FakeAgent:
    """A guest agent; ``answers`` says whether the guest runs one."""

    def __init__(self, answers: bool = False) -> None:
        self.answers = answers
        self.channel = SimpleNamespace(present=False)
        self.times = 0
        self.traffic = (3, 4)
        self.is_frozen = False
        self.hangs = 0  # how often it does not answer when it is to freeze or thaw

    async def ping(self, timeout: float = 1.0) -> bool:
        return self.answers

    async def addresses(self) -> tuple[str, ...]:
        return ("10.0.2.15",)

    async def thaw_forgotten(self) -> bool:
        return False

    async def frozen(self) -> bool:
        return self.is_frozen

    async def freeze(self) -> int:
        self.is_frozen = True
        if self.hangs:
            raise TimeLimitError("it hangs")
        return 1

    async def thaw(self) -> int:
        if self.hangs:
            self.hangs -= 1
            raise TimeLimitError("it hangs")
        self.is_frozen = False
        return 1

    async def set_time(self) -> None:
        self.times += 1


class FakeMachine:
    """A machine that obeys. ``deaf``: its guest ignores every request to shut down."""

    def __init__(self, plan: MachinePlan, pid: int, hypervisor: Hypervisor) -> None:
        self.plan = plan
        self.name = plan.name
        self.hypervisor = hypervisor
        self.run_state = RunState.RUNNING
        self.instance = Instance(
            pid=pid,
            start_ticks=pid * 100,
            host_boot="boot",
            uid=0,
            started=hypervisor.clock(),
            accelerator=plan.accelerator,
            qemu="10.0",
            cpus=plan.cpus,
            memory=plan.memory,
            generation=plan.generation,
        )
        self.agent = FakeAgent()
        self.deaf = hypervisor.deaf
        self.calls: list[str] = []
        self.detached = False
        self.nodes = [disk.node for disk in plan.disks]
        self.forked = False
        self.on_event: Callable[[MachineEvent], None] | None = None
        self._end: asyncio.Future[ExitReport] = asyncio.get_running_loop().create_future()

    async def wait_exit(self) -> ExitReport:
        return await asyncio.shield(self._end)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._end.done()

    def ends(self, hint: str, **values: Any) -> None:
        """It ends, for whatever reason."""
        self.run_state = RunState.ENDED
        self.hypervisor.alive.discard(self.plan.id)
        if not self._end.done():
            now = self.hypervisor.clock()
            self._end.set_result(ExitReport(hint=hint, time=now, **values))

    def _need(self, *states: RunState) -> None:
        if self.run_state not in states:
            raise WrongStateError(f"it is {self.run_state}")

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        await self.hypervisor.hook(name)

    async def pause(self) -> None:
        self._need(RunState.RUNNING)
        await self._call("pause")
        self.run_state = RunState.PAUSED

    async def resume(self) -> None:
        self._need(RunState.PAUSED, RunState.IO_ERROR)
        await self._call("resume")
        self.run_state = RunState.RUNNING

    async def reset(self) -> None:
        await self._call("reset")

    async def branch(self, disks: tuple[PlanDisk, ...]) -> None:
        self._need(RunState.RUNNING, RunState.PAUSED, RunState.IO_ERROR)
        await self._call("branch")
        self.nodes = [disk.node for disk in disks]

    async def branched(self, disks: tuple[PlanDisk, ...]) -> bool:
        if self.over:
            raise QmpError("it is gone")
        return self.nodes == [disk.node for disk in disks]

    async def save_memory(
        self, path: Path, progress: Callable[[float], None] | None = None
    ) -> None:
        self._need(RunState.PAUSED, RunState.IO_ERROR)
        await self._call("save_memory")
        self._write(path)

    async def make_savable(self) -> None:
        self._need(RunState.PAUSED, RunState.IO_ERROR)
        await self._call("make_savable")

    def _write(self, path: Path) -> None:
        if self.over:
            raise QmpError("it is gone")
        path.with_name(path.name + ".plan").write_bytes(msgspec.json.encode(self.plan))
        path.write_text(json.dumps(self.nodes))

    async def save_live(
        self,
        path: Path,
        disks: tuple[PlanDisk, ...],
        progress: Callable[[float], None] | None = None,
    ) -> float:
        self._need(RunState.RUNNING)
        await self._call("save_live")
        self.nodes = [disk.node for disk in disks]
        await self._call("publish_state")
        self._write(path)
        return 0.004

    async def stop_saving(self) -> None:
        self._need(RunState.RUNNING, RunState.PAUSED, RunState.IO_ERROR)

    async def absorb(
        self,
        layers: Sequence[DiskLayer],
        index: int,
        progress: Callable[[float], None] | None = None,
        fresh: Collection[str] = (),
    ) -> None:
        await self._call("absorb")
        if self.over:
            raise QmpError("it is gone")

    async def begin_fold(
        self,
        layers: Sequence[DiskLayer],
        keep: Collection[str],
        fresh: Collection[str],
        progress: Callable[[float], None] | None = None,
    ) -> None:
        await self._call("begin_fold")
        if self.over:
            raise QmpError("it is gone")

    async def end_fold(self, layers: Sequence[DiskLayer]) -> None:
        self._need(RunState.PAUSED)
        self.nodes = [layers[1].node if node == layers[0].node else node for node in self.nodes]
        await self._call("end_fold")
        if self.over:
            raise QmpError("it is gone")

    async def drop_folded(self, disks: tuple[PlanDisk, ...]) -> None:
        await self._call("drop_folded")

    async def written(self) -> list[str]:
        return list(self.nodes)

    async def give_up_merging(self) -> None:
        await self._call("give_up_merging")

    async def power_button(self) -> None:
        self._need(RunState.RUNNING)
        await self._call("power_button")
        if not self.deaf:
            self.ends("guest-shutdown", code=0)

    async def agent_shutdown(self, timeout: float = 1.0) -> None:
        if not self.agent.answers:
            raise GuestAgentError("nobody there")
        await self._call("agent_shutdown")
        if not self.deaf:
            self.ends("guest-shutdown", code=0)

    async def quit(self, timeout: float = 1.0) -> ExitReport:
        await self._call("quit")
        self.ends("quit", code=0)
        return await self.wait_exit()

    async def suspend(self, path: Path) -> ExitReport:
        await self._call("suspend")
        path.write_bytes(b"state")
        path.with_name(path.name + ".plan").write_bytes(msgspec.json.encode(self.plan))
        self.ends("suspended", code=0)
        return await self.wait_exit()

    async def stats(self) -> MachineStats:
        return MachineStats()

    async def detach(self) -> None:
        self.detached = True


@dataclass
class Hypervisor:
    """Stands in for `QemuMachine`: what was started, and what goes wrong next."""

    clock: Callable[[], float]
    machines: list[FakeMachine] = field(default_factory=list)
    alive: set[str] = field(default_factory=set)
    failures: list[BaseException | None] = field(default_factory=list)
    hooks: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    adoptable: dict[str, FakeMachine | Exception] = field(default_factory=dict)
    deaf: bool = False

    async def hook(self, name: str) -> None:
        if name in self.hooks:
            await self.hooks[name]()

    async def start(
        self,
        plan: MachinePlan,
        emulator: Emulator,
        *,
        on_event: Callable[[MachineEvent], None] | None = None,
    ) -> FakeMachine:
        assert plan.id not in self.alive, "one VM would run twice"
        self.alive.add(plan.id)
        try:
            await self.hook("start")
            failure = self.failures.pop(0) if self.failures else None
            if failure is not None:
                raise failure
            if plan.incoming is not None:  # as the real one does
                Path(plan.incoming).unlink()
                Path(plan.incoming + ".plan").unlink()
        except BaseException:
            self.alive.discard(plan.id)
            raise
        machine = FakeMachine(plan, 1000 + len(self.machines), self)
        machine.on_event = on_event
        self.machines.append(machine)
        return machine

    async def adopt(
        self,
        instance: Instance | None,
        run_directory: Path,
        directory: Path,
        *,
        on_event: Callable[[MachineEvent], None] | None = None,
    ) -> FakeMachine | None:
        found = self.adoptable.get(run_directory.name)
        if isinstance(found, Exception):
            raise found
        if found is not None:
            found.on_event = on_event
        return found

    @property
    def machine(self) -> FakeMachine:
        """The one that was started last."""
        return self.machines[-1]


@dataclass
class Rig:
    """Operations above, actors below, fakes beneath."""

    world: World
    environment: Environment
    hypervisor: Hypervisor
    actors: dict[str, VMActor] = field(default_factory=dict)
    _following: asyncio.Task[None] | None = None

    @property
    def store(self) -> Store:
        return self.world.store

    def actor(self, vm: VM | str) -> VMActor:
        id = vm if isinstance(vm, str) else vm.meta.id
        if id not in self.actors:
            self.actors[id] = VMActor(self.environment, id, VM_VERBS)
            self.actors[id].launch()
        return self.actors[id]

    def begin(self) -> None:
        """What `HostAgent` does: wakes actors as records change."""
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for batch in self.store.watch([VM, Task], 0):
            for change in batch.changes:
                record = change.record
                if change.kind is VM:
                    self.actor(change.id).wake()
                elif isinstance(record, Task) and record.spec.cancel and not _over(record):
                    self.actor(record.spec.object.id).cancel_task(record.meta.id)

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
            self._following = None
        for actor in self.actors.values():
            await actor.close()
        self.actors.clear()
        # A daemon that is gone writes nothing more: what it asked for last is done by now.
        with contextlib.suppress(UndercroftError):
            await self.store.transact(Transaction())

    async def kill(self) -> None:
        """The daemon dies: what it was about to do it does not do."""
        for actor in self.actors.values():
            for task in (actor._loop_task, actor._running):
                if task is not None:
                    task.cancel()
        self.actors.clear()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if "_go_over" in repr(task):
                task.cancel()
        await asyncio.sleep(0.05)
        await self.close()

    async def disk(self, vm: VM) -> Path:
        """The file that the VM's first disk is written to."""
        head = await head_layer(self.environment, vm.spec.disks[0].volume)
        return self.environment.layer_path(head)

    async def again(self) -> None:
        """The daemon ends, and another begins."""
        await self.close()
        for item in (await self.store.list(VM)).items:
            actor = VMActor(self.environment, item.record.meta.id, VM_VERBS)
            await actor.adopt(item.record)
            self.actors[actor.id] = actor
        for actor in self.actors.values():
            actor.launch()
        self.begin()

    async def final(self, task: Task) -> Task:
        """The task once it is over."""
        found = await self.world.operations.tasks.wait(SYSTEM, task.meta.id, 20)
        assert found.record.status.state.final, f"{found.record.spec.verb} goes on for ever"
        return found.record

    async def until(self, ref: str, wanted: Callable[[VM], bool]) -> VM:
        """The VM once something is true of it."""
        async with asyncio.timeout(20):
            while not wanted(vm := await self.world.vm(ref)):
                await asyncio.sleep(0.002)
        return vm

    async def state(self, ref: str, state: VMState) -> VM:
        return await self.until(ref, lambda vm: vm.status.state is state and not vm.tasks)


def adoptable(rig: Rig, machine: FakeMachine) -> None:
    """The next daemon finds this machine."""
    rig.hypervisor.adoptable[machine.plan.id] = machine
    directory = rig.environment.run_directory(machine.plan.id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "qmp.sock").touch()


def _over(task: Task) -> bool:
    return task.status.state.final


@contextlib.asynccontextmanager
async def rigged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """A rig in a temporary directory."""
    directory = DataDirectory.open(tmp_path / "data")
    store = await SQLiteStore.open(directory.store_file)
    world = World(store, Services(tmp_path))

    async def accelerator(arch: str) -> str:
        return "tcg"

    environment = Environment(
        store=store,
        host=HOST,
        directory=directory,
        accelerator=accelerator,
        privileged=False,
    )
    object.__setattr__(world.context, "clock", environment.clock)
    hypervisor = Hypervisor(environment.clock)
    emulator = Emulator(arch="x86_64", path="/nonexistent/qemu", version=(10, 0, 2))

    async def find(arch: str) -> Emulator:
        return emulator

    async def volume(path: Path, size: int, **_: Any) -> None:
        await hypervisor.hook("create_volume")
        path.write_bytes(b"volume")

    monkeypatch.setattr(Environment, "emulator", lambda self, arch: find(arch))
    monkeypatch.setattr(power, "QemuMachine", hypervisor)
    monkeypatch.setattr(actor_module, "QemuMachine", hypervisor)
    monkeypatch.setattr("undercroft.storage.datastores.directory.create_volume", volume)
    monkeypatch.setattr(exits, "backoff", lambda restarts: 0.01)
    monkeypatch.setattr(power, "ASK_INTERVAL", 0.01)
    monkeypatch.setattr(power, "AGENT_PATIENCE", 0.01)
    rig = Rig(world, environment, hypervisor)
    rig.begin()
    try:
        yield rig
    finally:
        await rig.close()
        await store.close()


def refused(message: str = "no such board") -> QemuStartError:
    """QEMU would not start."""
    return QemuStartError(message)
