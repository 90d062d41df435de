"""A daemon without its API in a process of its own, to which something happens at the step that it
is told (see `fuse`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.system.host.fuse import KILLED, Fuse, Victim
from undercroft.host import orphans
from undercroft.host.agent import HostAgent
from undercroft.host.environment import Environment
from undercroft.host.layers import chain, get_layer, plan_layers
from undercroft.host.registration import register
from undercroft.hypervisor import sockets
from undercroft.hypervisor.blockgraph import block_nodes
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import QmpError, TimeLimitError, UndercroftError
from undercroft.model.snapshot import Snapshot, SnapshotState
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.vm import VM, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import Context
from undercroft.operations.core import Operations
from undercroft.storage.process import run
from undercroft.store.datadir import DataDirectory
from undercroft.store.sqlite import SQLiteStore

_DUMPED = re.compile(r"[0-9a-f]{8}:  ((?:[0-9a-f]{2} ){16})")
_DRIVE = re.compile(r"\bcd(\d)-dev\b")
LEASH = 60.0  # seconds that anything may take


class Incarnation:
    """The parent's side: asks, and learns what became of it."""

    def __init__(self, data: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.blown = False
        self._pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_main, args=(data, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(
        self, verb: str, *arguments: Any, steps: int = 0, victim: Victim = Victim.DAEMON
    ) -> Any:
        """Has it do something; what happens to whom after ``steps`` (0: nothing), `blown` tells if
        it survived that.

        Raises:
            EOFError: it died. UndercroftError: it was refused.
        """
        try:
            self._pipe.send((steps, victim, verb, arguments))
            if not self._pipe.poll(LEASH):
                raise AssertionError(f"{verb}{arguments} takes for ever")
            self.blown, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            assert self.process.exitcode in (KILLED, -9), self.process.exitcode
            raise EOFError from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.join()


def _main(data: Path, pipe: Connection) -> None:
    os.setsid()
    fuse = Fuse(data)
    asyncio.run(_live(data, pipe, fuse))
    os._exit(0)


async def _live(data: Path, pipe: Connection, fuse: Fuse) -> None:
    world: World | None = None
    while True:
        steps, victim, verb, arguments = await asyncio.to_thread(pipe.recv)
        fuse.set(steps, victim)
        answer: Any
        try:
            if world is None:
                world = await World.begin(data)
            answer = await asyncio.wait_for(getattr(world, verb)(*arguments), LEASH)
        except UndercroftError as error:
            answer = UndercroftError(f"{error.code}: {error.message}")
        except Exception as error:
            if isinstance(error, TimeoutError):  # what is everybody waiting for?
                for task in asyncio.all_tasks():
                    task.print_stack()
            answer = AssertionError(f"{type(error).__name__}: {error}")
        fuse.clear()
        pipe.send((fuse.blown, answer))


class World:
    """The child's side: what it can be asked for."""

    def __init__(self, environment: Environment, agent: HostAgent) -> None:
        self.environment = environment
        self.agent = agent
        context = Context(store=environment.store, host=environment.host, services=agent.services)
        self.operations = Operations(context)

    @classmethod
    async def begin(cls, data: Path) -> World:
        """What `undercroft.api.daemon` does, without an API."""
        directory = DataDirectory.open(data)
        directory.lock()
        store = await SQLiteStore.open(directory.store_file)

        async def accelerator(arch: str) -> str:
            return "tcg"

        environment = Environment(
            store=store,
            host=await register(store, 0.0),
            directory=directory,
            accelerator=accelerator,
        )
        agent = HostAgent(environment)
        await agent.start()
        return cls(environment, agent)

    async def do(self, path: str, *arguments: Any) -> list[str]:
        """Calls an operation, and waits for its tasks; their ids."""
        verb: Callable[..., Coroutine[Any, Any, Any]] = self.operations  # type: ignore[assignment]
        for name in path.split("."):
            verb = getattr(verb, name)
        asked = await verb(SYSTEM, *arguments)
        tasks = asked if isinstance(asked, list) else [asked]
        for task in tasks:
            if isinstance(task, Task):
                await self.operations.tasks.wait(SYSTEM, task.meta.id, LEASH)
        return [task.meta.id for task in tasks if isinstance(task, Task)]

    async def do_both(self, first: str, these: Any, then: str, those: Any) -> None:
        """Asks for two things, the second before the first is done."""
        for path, arguments in ((first, these), (then, those)):
            verb: Any = self.operations
            for name in path.split("."):
                verb = getattr(verb, name)
            await verb(SYSTEM, *arguments)

    async def peace(self) -> dict[str, tuple[str, str, str, str, dict[str, Any]]]:
        """Waits until nothing is under way; each task's verb, object, state, error and arguments,
        oldest first."""
        store = self.environment.store
        while True:
            vms = [item.record for item in (await store.list(VM)).items]
            tasks = [item.record for item in (await store.list(Task)).items]
            if all(task.status.state.final for task in tasks) and not any(vm.tasks for vm in vms):
                break
            await asyncio.sleep(0.02)
        return {
            task.meta.id: (
                task.spec.verb,
                task.spec.object.name,
                task.status.state.value,
                f"{error.code}: {error.detail}" if (error := task.status.error) else "",
                task.spec.arguments,
            )
            for task in sorted(tasks, key=lambda task: task.meta.created)
        }

    async def states(self) -> dict[str, str]:
        """The state of each VM."""
        vms = [item.record for item in (await self.environment.store.list(VM)).items]
        return {vm.meta.name: vm.status.state.value for vm in vms}

    async def ids(self) -> dict[str, str]:
        """The id of each VM."""
        vms = [item.record for item in (await self.environment.store.list(VM)).items]
        return {vm.meta.name: vm.meta.id for vm in vms}

    async def settled(self) -> None:
        """Waits until it is noticed of every QEMU that has ended that it has."""
        while True:
            vms = [item.record for item in (await self.environment.store.list(VM)).items]
            started = [vm.status.instance for vm in vms if vm.status.instance is not None]
            living = await asyncio.to_thread(orphans.marked_processes, self.environment.data)
            if all(one.pid in living for one in started):
                return
            await asyncio.sleep(0.01)

    async def stopped(self, name: str) -> None:
        """Waits until a VM does not run."""
        while (await self.operations.vms.get(SYSTEM, name)).record.status.instance is not None:
            await asyncio.sleep(0.01)

    async def running(self, name: str) -> None:
        """Waits until a VM runs."""
        while True:
            vm = (await self.operations.vms.get(SYSTEM, name)).record
            if vm.status.state is VMState.RUNNING and self.agent.machine(vm.meta.id) is not None:
                return
            await asyncio.sleep(0.01)

    async def frozen(self) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
        """All snapshots, by the names of VM and snapshot, and all templates, by id: the layer that
        the first disk of each has."""
        names = {id: name for name, id in (await self.ids()).items()}
        store = self.environment.store
        while True:
            templates = [item.record for item in (await store.list(Template)).items]
            if not any(one.spec.passing for one in templates):
                break
            await asyncio.sleep(0.02)
        snapshots = [item.record for item in (await store.list(Snapshot)).items]
        assert all(one.status.state is SnapshotState.READY for one in snapshots), snapshots
        assert not any(one.spec.passing for one in snapshots), snapshots
        return (
            {(names[s.spec.vm], s.meta.name): s.status.disks[0].layer for s in snapshots},
            {t.meta.id: t.status.disks[0].layer for t in templates},
        )

    async def findings(self) -> list[str]:
        """What is not in order."""
        report = await self.operations.hosts.check(SYSTEM)
        return [finding.message for finding in report.findings]

    async def write(self, name: str, commands: list[str]) -> None:
        """Has commands of ``qemu-io`` carried out on a VM's disk, by its QEMU if it runs."""
        vm = (await self.operations.vms.get(SYSTEM, name)).record
        machine = self.agent.machine(vm.meta.id)
        if machine is None:
            await self._outside(await self._head(vm), commands, False)
            return
        for text in commands:
            await hmp(machine._monitor.execute, text)

    async def read(self, what: str, name: str, places: list[int], length: int) -> list[int]:
        """The byte that each of these places holds, all ``length`` bytes of it; -1: not so.
        ``what``: ``head``, of the disk of a VM, or ``layer``, which is no head."""
        layer, share = name, True
        if what == "head":
            vm = (await self.operations.vms.get(SYSTEM, name)).record
            machine = self.agent.machine(vm.meta.id)
            layer, share = await self._head(vm), machine is not None
            if machine is not None:
                await hmp(machine._monitor.execute, "flush")
        commands = [f"read -v {place} {length}" for place in places]
        dumped = await self._outside(layer, commands, share)
        found: list[int] = []
        for part in dumped.split("ops; ")[:-1]:
            bytes_ = {
                byte
                for line in part.splitlines()
                if (match := _DUMPED.match(line))
                for byte in match[1].split()
            }
            found.append(int(bytes_.pop(), 16) if len(bytes_) == 1 else -1)
        assert len(found) == len(places), dumped
        return found

    async def _head(self, vm: VM) -> str:
        volume = await self.environment.store.get(Volume, vm.spec.disks[0].volume)
        assert volume is not None
        return volume.record.status.head

    async def _outside(self, layer: str, commands: list[str], share: bool) -> str:
        node: dict[str, Any] | None = None
        for one in reversed(await plan_layers(self.environment, layer, 0)):
            file = {"driver": "file", "filename": one.path}
            node = {"driver": "qcow2", "file": file, "backing": node, "force-share": share}
        command = ["qemu-io", *(["-r"] if share else [])]
        command += [part for text in commands for part in ("-c", text)]
        return (await run([*command, "json:" + json.dumps(node)], timeout=LEASH)).decode()

    async def drives(self, name: str) -> tuple[dict[int, str | None], dict[int, int], int, int]:
        """What is in each CD-ROM drive of a VM as its record says, how many bytes its QEMU has
        there (0: nothing), and how many nodes and descriptors this has open in all."""
        vm = (await self.operations.vms.get(SYSTEM, name)).record
        machine = self.agent.machine(vm.meta.id)
        assert machine is not None
        sizes: dict[int, int] = {}
        for entry in await machine._monitor.execute("query-block"):
            if (match := _DRIVE.search(str(entry.get("qdev")))) is not None:
                assert not entry["tray_open"]
                inserted = entry.get("inserted")
                sizes[int(match[1])] = inserted["image"]["virtual-size"] if inserted else 0
        media = {drive.unit: drive.medium for drive in vm.spec.cdroms}
        assert {drive.unit: drive.path for drive in machine.plan.cdroms} == media
        nodes = await block_nodes(machine._monitor)
        sets = await machine._monitor.execute("query-fdsets")
        return media, sizes, sum(node.startswith("cd") for node in nodes), len(sets)

    async def head(self, name: str) -> str:
        """The layer that the disk of a VM is written to."""
        return await self._head((await self.operations.vms.get(SYSTEM, name)).record)

    async def disk_head(self, name: str, index: int) -> str:
        """The layer that one of the disks of a VM is written to."""
        vm = (await self.operations.vms.get(SYSTEM, name)).record
        volume = await self.environment.store.get(Volume, vm.spec.disks[index].volume)
        assert volume is not None
        return volume.record.status.head

    async def encrypted(self, layer: str) -> bool:
        """Whether what is written to a layer is."""
        return (await get_layer(self.environment, layer)).spec.encrypted

    async def depth(self, name: str) -> int:
        """Of how many layers the disk of a VM consists."""
        vm = (await self.operations.vms.get(SYSTEM, name)).record
        return len(await chain(self.environment, await self._head(vm)))


async def write_without_daemon(data: Path, vm: str, commands: Callable[[], list[str]]) -> bool:
    """Has commands of ``qemu-io`` carried out by the QEMU of a VM (an id) if its guest runs, while
    there is no daemon; whether it did."""
    path = data / "run" / "vms" / vm / "qmp.sock"
    wrote = False
    monitor = Monitor(vm, lambda event: None, lambda: None)
    with contextlib.suppress(OSError, QmpError, TimeLimitError):
        await monitor.connect(await asyncio.to_thread(sockets.connect, path), timeout=20.0)
        if (await monitor.execute("query-status"))["status"] == "running":
            for command in commands():
                await hmp(monitor.execute, command)
            wrote = True
        await monitor.close()
    return wrote


async def hmp(execute: Callable[..., Coroutine[Any, Any, Any]], command: str) -> None:
    """A command of ``qemu-io`` on the first disk of a QEMU. What it says goes to QEMU's output."""
    line = f'qemu-io -d /machine/peripheral/disk0-dev/virtio-backend "{command}"'
    answer = await execute("human-monitor-command", {"command-line": line})
    assert not answer, answer
