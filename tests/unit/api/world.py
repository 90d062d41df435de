"""A daemon without a hypervisor: real operations, a real store and the real API on a real socket,
over a host that only pretends to run VMs."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from undercroft.api.server import ApiServer
from undercroft.client.client import Client
from undercroft.client.connect import Endpoint
from undercroft.host.repositories import Repositories
from undercroft.model.appliance import Appliance, ApplianceDisk
from undercroft.model.backup import Backup
from undercroft.model.base import Meta
from undercroft.model.checkpoint import Changes, Checkpoint
from undercroft.model.datastore import Datastore
from undercroft.model.errors import GuestAgentError, NotFoundError, UndercroftError
from undercroft.model.host import Host, HostStatus
from undercroft.model.names import new_id
from undercroft.model.requests import CheckReport, ExecRequest, ExecResult, VMSample
from undercroft.model.task import Task, TaskState, TaskStatus
from undercroft.model.transfer import ImportSource, UploadStatus
from undercroft.model.vm import VM, VMSpec, VMState, VMStatus
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import Context
from undercroft.operations.core import Operations
from undercroft.operations.services import ByteStream, ConsoleSession, Examined
from undercroft.storage.catalogue import CatalogueEntry, load_catalogue
from undercroft.store.datadir import DataDirectory
from undercroft.store.interface import Claim, Put, Transaction, update
from undercroft.store.sqlite import SQLiteStore

T = TypeVar("T")


class Echo:
    """A console, or a display, that says again what it hears. ``quit`` ends it."""

    def __init__(self, greeting: bytes = b"") -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=4)
        self.closed = asyncio.Event()
        self.written = 0
        self.taken = 0
        self.instead: Callable[[bytes], Awaitable[None]] | None = None
        if greeting:
            self.queue.put_nowait(greeting)

    async def read(self) -> bytes:
        data = await self.queue.get()
        self.taken += len(data)
        return data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def write(self, data: bytes) -> None:
        if self.instead is not None:
            await self.instead(data)
            return
        self.written += len(data)
        await self.queue.put(b"" if data == b"quit" else data)

    async def close(self) -> None:
        self.closed.set()


@dataclass
class FakeHost(Repositories):
    """What a host does, without doing it."""

    tmp: Path
    files: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    consoles: list[Echo] = field(default_factory=list)
    running: list[VMSample] = field(default_factory=list)
    repaired: list[bool] = field(default_factory=list)
    began: asyncio.Event = field(default_factory=asyncio.Event)  # a program has been started

    def held(self, template: str) -> list[str]:
        return []

    async def exec(self, vm: VM, request: ExecRequest) -> ExecResult:
        if request.argv[0] == "break":
            raise KeyError("a secret of the inside")
        self.began.set()
        await asyncio.sleep(0.01 if request.argv[0] != "sleep" else request.timeout)
        return ExecResult(exit_code=0, stdout=" ".join(request.argv).encode())

    async def read_file(self, vm: VM, path: str) -> AsyncIterator[bytes]:
        if path not in self.files:
            raise GuestAgentError(f"{path} does not exist", object=vm.label)
        content = self.files[path]
        for start in range(0, len(content), 50_000):
            yield content[start : start + 50_000]
        if path == "/cut":
            raise GuestAgentError("the agent went away in the middle", object=vm.label)

    async def write_file(
        self, vm: VM, path: str, content: AsyncIterator[bytes], mode: int | None = None
    ) -> int:
        self.files[path] = b"".join([piece async for piece in content])
        self.files[f"{path}:mode"] = repr(mode).encode()
        return len(self.files[path])

    async def screenshot(self, vm: VM) -> bytes:
        return b"\x89PNG\r\n\x1a\n" + bytes(16)

    async def console(self, vm: VM, scrollback: int) -> ConsoleSession:
        self.consoles.append(Echo(b"x" * scrollback))
        return self.consoles[-1]

    async def vnc(self, vm: VM) -> ByteStream:
        self.consoles.append(Echo(b"RFB 003.008\n"))
        return self.consoles[-1]

    async def log(self, vm: VM, limit: int) -> bytes:
        return ("ready \N{SNOWMAN}\n".encode() * 100)[-limit:] if limit else b""

    async def samples(self) -> Sequence[VMSample]:
        return self.running

    async def measure(self, *, now: bool = False) -> Mapping[str, int]:
        return {}

    async def prepare_datastore(self, path: str, id: str) -> bool:
        return False

    async def forget_datastore(self, datastore: Datastore) -> None:
        pass

    async def check_volumes(self, repair: bool) -> CheckReport:
        return CheckReport(checked={"volumes": 1})

    async def check(self, repair: bool) -> CheckReport:
        self.repaired.append(repair)
        return CheckReport(checked={"vms": 3})

    async def catalogue(self) -> dict[str, CatalogueEntry]:
        return load_catalogue()

    async def read_export(self, path: Path, start: int, end: int) -> AsyncIterator[bytes]:
        content = path.read_bytes()[start:end]
        for at in range(0, len(content), 50_000):
            yield content[at : at + 50_000]

    async def check_medium(self, path: str) -> None:
        pass

    async def examine(self, source: ImportSource) -> Examined:
        disk = ApplianceDisk(file="web1.vmdk", size=1 << 30)
        return Examined(Appliance(name="web1", disks=(disk,)), None, "x86_64")

    async def upload_status(self, key: str) -> UploadStatus:
        return UploadStatus(key=key, size=len(self.uploads.get(key, b"")))

    async def append_upload(
        self, key: str, offset: int, content: AsyncIterator[bytes]
    ) -> UploadStatus:
        self.uploads[key] = self.uploads.get(key, b"") + b"".join(
            [piece async for piece in content]
        )
        return await self.upload_status(key)

    async def remove_upload(self, key: str) -> UploadStatus:
        return UploadStatus(key=key, size=len(self.uploads.pop(key, b"")))

    async def changes(
        self, vm: VM, checkpoint: Checkpoint, disk: int, since: Checkpoint | None
    ) -> Changes:
        return Changes(size=1 << 20, extents=())

    async def read_disk(
        self, vm: VM, checkpoint: Checkpoint, disk: int, offset: int, length: int
    ) -> AsyncIterator[bytes]:
        yield bytes(length)

    async def stream_backup(
        self, vm: VM, checkpoint: Checkpoint, id: str, description: str
    ) -> AsyncIterator[bytes]:
        yield b"an archive"

    async def archived(self, upload: str) -> Backup:
        raise NotFoundError(f"there is no upload {upload}")

    async def repository(self, path: str) -> str:
        return "repo-0000000000000000"

    def upload_path(self, name: str) -> Path:
        return self.tmp / f"upload-{secrets.token_hex(8)}"


@dataclass
class World:
    """Everything that a test may want to reach."""

    directory: DataDirectory
    store: SQLiteStore
    host: FakeHost
    operations: Operations
    server: ApiServer

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(path=str(self.directory.socket))

    def client(self) -> Client:
        return Client(self.endpoint, timeout=20.0)

    async def add_vms(self, count: int, state: VMState = VMState.STOPPED) -> list[VM]:
        """VMs that are simply there."""
        host = (await self.operations.hosts.list(SYSTEM)).items[0].record.meta.id
        vms = [
            VM(
                meta=Meta(
                    id=new_id("vm"),
                    name=f"web{number}",
                    created=1000.0 + number,
                    labels={"env": "prod" if number % 2 else "test"},
                ),
                spec=VMSpec(host=host, cpus=1 + number % 4),
                status=VMStatus(state=state),
            )
            for number in range(count)
        ]
        claims = [Claim("vm/default", vm.meta.name, vm.meta.id) for vm in vms]
        await self.store.transact(Transaction(claims=claims, puts=[Put(vm) for vm in vms]))
        return vms


async def ask(world: World, work: Callable[[Client], T]) -> T:
    """Lets the synchronous client work while the API runs here."""

    def run() -> T:
        with world.client() as client:
            return work(client)

    return await asyncio.to_thread(run)


async def finish_task(
    world: World, id: str, state: TaskState, error: UndercroftError | None = None
) -> None:
    """What the host's agent would write."""

    def change(task: Task) -> Task:
        problem = None if error is None else error.problem()
        return msgspec.structs.replace(task, status=TaskStatus(state=state, error=problem))

    await update(world.store, Task, id, change)


@contextlib.asynccontextmanager
async def running_world(path: Path, listen: str | None = None) -> AsyncIterator[World]:
    """A world whose API answers."""
    directory = DataDirectory.open(path)
    store = await SQLiteStore.open(directory.store_file)
    try:
        host = Host(
            meta=Meta(id=new_id("host"), name="here", created=1.0),
            status=HostStatus(cpus=2, memory=1 << 34, disk_total=1000, disk_free=500),
        )
        await store.transact(
            Transaction(claims=[Claim("host/default", "here", host.meta.id)], puts=[Put(host)])
        )
        services = FakeHost(directory.tmp)
        operations = Operations(Context(store=store, host=host.meta.id, services=services))
        server = ApiServer(operations, directory, listen)
        await server.start()
        try:
            yield World(directory, store, services, operations, server)
        finally:
            await server.stop()
    finally:
        await store.close()
