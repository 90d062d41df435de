"""This host as the operations see it: reaching into running VMs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from undercroft.host import uploads
from undercroft.host.environment import Environment
from undercroft.host.exports import read_export
from undercroft.host.importing import examine
from undercroft.host.reading import changes, read_disk
from undercroft.host.repositories import Repositories, archived
from undercroft.host.streaming import stream_backup
from undercroft.host.usage import measure
from undercroft.host.volume_check import check_volumes
from undercroft.hypervisor.console import read_log
from undercroft.hypervisor.guestagent import GuestAgent
from undercroft.hypervisor.machine import QemuMachine
from undercroft.hypervisor.medium import check_medium
from undercroft.model.backup import Backup
from undercroft.model.checkpoint import Changes, Checkpoint
from undercroft.model.datastore import Datastore
from undercroft.model.errors import DataError, GuestAgentError, UndercroftError, WrongStateError
from undercroft.model.names import new_id
from undercroft.model.requests import CheckReport, ExecRequest, ExecResult, VMSample
from undercroft.model.transfer import ImportSource, UploadStatus
from undercroft.model.vm import VM
from undercroft.operations.services import ByteStream, ConsoleSession, Examined
from undercroft.storage.catalogue import FILE_NAME, CatalogueEntry, load_catalogue
from undercroft.storage.datastores.directory import forget, prepare

READ_SIZE = 64 << 10


class SocketStream:
    """A connected socket as a `ByteStream`. Closing it ends whatever waits on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, connection: socket.socket) -> SocketStream:
        """Takes a socket over."""
        return cls(*await asyncio.open_connection(sock=connection, limit=READ_SIZE))

    async def read(self) -> bytes:
        """Some bytes; empty at the end."""
        try:
            return await self._reader.read(READ_SIZE)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        """Sends bytes."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            raise WrongStateError("the display has gone away") from None

    async def close(self) -> None:
        """Ends it."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class LocalHost(Repositories):
    """`undercroft.operations.services.HostServices` of the host that this daemon is."""

    def __init__(
        self,
        environment: Environment,
        machine_of: Callable[[str], QemuMachine | None],
        check: Callable[[bool], Awaitable[CheckReport]],
        held: Callable[[str], Sequence[str]],
    ) -> None:
        self._environment = environment
        self._machine_of = machine_of
        self._check = check
        self._held = held

    def held(self, template: str) -> Sequence[str]:
        """See `HostServices`."""
        return self._held(template)

    def _machine(self, vm: VM) -> QemuMachine:
        machine = self._machine_of(vm.meta.id)
        if machine is None:
            raise WrongStateError(
                f"{vm.label} is not running",
                object=vm.label,
                action=f"start it: croft start {vm.meta.name}",
                state=vm.status.state,
            )
        return machine

    def _agent(self, vm: VM) -> GuestAgent:
        agent = self._machine(vm).agent
        if agent is None:
            raise GuestAgentError(f"{vm.label} has no guest agent channel", object=vm.label)
        return agent

    async def exec(self, vm: VM, request: ExecRequest) -> ExecResult:
        """Runs a program in the guest through its agent."""
        return await self._agent(vm).exec(
            request.argv, input=request.input, env=request.env, timeout=request.timeout
        )

    def read_file(self, vm: VM, path: str) -> AsyncIterator[bytes]:
        """The content of a file in the guest."""
        return self._agent(vm).read_file(path)

    async def write_file(
        self, vm: VM, path: str, content: AsyncIterator[bytes], mode: int | None = None
    ) -> int:
        """Writes a file in the guest."""
        return await self._agent(vm).write_file(path, content, mode)

    async def screenshot(self, vm: VM) -> bytes:
        """The display as PNG."""
        return await self._machine(vm).screenshot()

    async def console(self, vm: VM, scrollback: int) -> ConsoleSession:
        """Attaches to the serial console."""
        return await self._machine(vm).console.attach(scrollback)

    async def vnc(self, vm: VM) -> ByteStream:
        """Attaches to the display."""
        return await SocketStream.open(await self._machine(vm).vnc())

    async def log(self, vm: VM, limit: int) -> bytes:
        """The last bytes of console output."""
        directory = self._environment.vm_directory(vm.meta.id)
        return await asyncio.to_thread(read_log, directory, limit)

    async def samples(self) -> Sequence[VMSample]:
        """Measurements of all running VMs; one that ends meanwhile is left out."""
        listing = await self._environment.store.list(VM)
        running = [
            (item.record, machine)
            for item in listing.items
            if not item.record.spec.passing
            and (machine := self._machine_of(item.record.meta.id)) is not None
        ]
        return [
            sample
            for sample in await asyncio.gather(*(_sample(vm, m) for vm, m in running))
            if sample is not None
        ]

    async def measure(self, *, now: bool = False) -> Mapping[str, int]:
        """What the layers take on the host."""
        return await measure(self._environment, now=now)

    async def prepare_datastore(self, path: str, id: str) -> bool:
        """Makes a directory a datastore."""
        environment = self._environment
        known = {i.record.meta.id for i in (await environment.store.list(Datastore)).items}
        own = await asyncio.to_thread(environment.data.resolve)
        place = await asyncio.to_thread(Path(path).resolve)
        if place == own or own in place.parents or place in own.parents:
            raise DataError(
                f"{path} and the data directory {own} lie in each other",
                object=path,
                action="choose a directory outside of it",
            )
        return await asyncio.to_thread(
            prepare, Path(path), id, environment.host, known.__contains__
        )

    async def forget_datastore(self, datastore: Datastore) -> None:
        """Makes a directory no datastore any more."""
        await asyncio.to_thread(forget, Path(datastore.spec.path), datastore.meta.id)

    async def check_volumes(self, repair: bool) -> CheckReport:
        """Looks for what is wrong with volumes and their layers."""
        return await check_volumes(self._environment, repair)

    async def check(self, repair: bool) -> CheckReport:
        """Looks for what a crash left behind."""
        return await self._check(repair)

    async def catalogue(self) -> dict[str, CatalogueEntry]:
        """The images that can be fetched by name."""
        return await asyncio.to_thread(load_catalogue, self._environment.data / FILE_NAME)

    def read_export(self, path: Path, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes of a finished file of an export."""
        return read_export(path, start, end)

    async def check_medium(self, path: str) -> None:
        """Does nothing if a file can be in a CD-ROM drive."""
        await asyncio.to_thread(check_medium, path)

    async def examine(self, source: ImportSource) -> Examined:
        """What is in a file that comes in."""
        return await examine(self._environment, source)

    async def upload_status(self, key: str) -> UploadStatus:
        """How much of what is being sent is there."""
        return await uploads.status(self._environment, key)

    async def append_upload(
        self, key: str, offset: int, content: AsyncIterator[bytes]
    ) -> UploadStatus:
        """Adds to it."""
        return await uploads.append(self._environment, key, offset, content)

    async def remove_upload(self, key: str) -> UploadStatus:
        """Forgets it."""
        return await uploads.remove(self._environment, key)

    async def changes(
        self, vm: VM, checkpoint: Checkpoint, disk: int, since: Checkpoint | None
    ) -> Changes:
        """What of a disk at a checkpoint is not what it was at an earlier one."""
        return await changes(self._environment, vm, checkpoint, disk, since)

    def stream_backup(
        self, vm: VM, checkpoint: Checkpoint, id: str, description: str
    ) -> AsyncIterator[bytes]:
        """A backup as an archive."""
        return stream_backup(self._environment, vm, checkpoint, id, description)

    async def archived(self, upload: str) -> Backup:
        """What is in an archive that was sent."""
        return await archived(self._environment, upload)

    def read_disk(
        self, vm: VM, checkpoint: Checkpoint, disk: int, offset: int, length: int
    ) -> AsyncIterator[bytes]:
        """A part of a disk at a checkpoint."""
        return read_disk(self._environment, vm, checkpoint, disk, offset, length)

    def upload_path(self, name: str) -> Path:
        """A fresh path for content that is being sent."""
        return self._environment.tmp / f"upload-{new_id('image').removeprefix('img-')}"


async def _sample(vm: VM, machine: QemuMachine) -> VMSample | None:
    try:
        stats = await machine.stats()
    except (UndercroftError, OSError):
        return None
    received, sent = machine.agent.traffic if machine.agent is not None else (0, 0)
    return VMSample(
        vm=vm.meta.id,
        name=vm.meta.name,
        cpu_seconds=stats.cpu_seconds,
        memory=stats.memory,
        disk_read_bytes=stats.disk_read_bytes,
        disk_write_bytes=stats.disk_write_bytes,
        disk_reads=stats.disk_reads,
        disk_writes=stats.disk_writes,
        net_receive_bytes=received,
        net_transmit_bytes=sent,
    )
