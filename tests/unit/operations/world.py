"""A store in a temporary directory, a host that only remembers what it was asked, and callers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from undercroft.host.repositories import Repositories
from undercroft.model.appliance import Appliance
from undercroft.model.backup import Backup
from undercroft.model.base import Meta, Record
from undercroft.model.checkpoint import Changes, Checkpoint
from undercroft.model.datastore import Datastore
from undercroft.model.errors import NotFoundError
from undercroft.model.image import (
    Image,
    ImageContent,
    ImageDefaults,
    ImageSourceKind,
    ImageSpec,
    ImageState,
    ImageStatus,
)
from undercroft.model.names import new_id
from undercroft.model.requests import CheckReport, ExecRequest, ExecResult, VMCreate, VMSample
from undercroft.model.task import Task, TaskState
from undercroft.model.transfer import ImportSource, UploadStatus
from undercroft.model.vm import VM, Power, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM, Caller
from undercroft.operations.context import Context, scope
from undercroft.operations.core import Operations
from undercroft.operations.services import ByteStream, ConsoleSession, Examined
from undercroft.storage.catalogue import CatalogueEntry
from undercroft.store.interface import Claim, Put, Store, Transaction, update

HOST = "host-0000000000000000"


class Session:
    """A console on which nothing happens."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _pieces()

    async def write(self, data: bytes) -> None:
        """Nothing listens."""

    async def close(self) -> None:
        """Nothing to end."""

    async def read(self) -> bytes:
        return b""


async def _pieces() -> AsyncIterator[bytes]:
    yield b"piece"


class Services(Repositories):
    """`HostServices` that remembers the calls."""

    def __init__(self, tmp: Path) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.holding: dict[str, list[str]] = {}
        self._tmp = tmp
        self.uploads: dict[str, bytes] = {}
        self.examined = Examined(Appliance(name="Old Server"), None, "x86_64")

    async def exec(self, vm: VM, request: ExecRequest) -> ExecResult:
        self.calls.append(("exec", vm.meta.id, request))
        return ExecResult(exit_code=0)

    def read_file(self, vm: VM, path: str) -> AsyncIterator[bytes]:
        self.calls.append(("read_file", vm.meta.id, path))
        return _pieces()

    async def write_file(
        self, vm: VM, path: str, content: AsyncIterator[bytes], mode: int | None = None
    ) -> int:
        self.calls.append(("write_file", vm.meta.id, path, mode))
        return len(b"".join([piece async for piece in content]))

    async def screenshot(self, vm: VM) -> bytes:
        self.calls.append(("screenshot", vm.meta.id))
        return b"\x89PNG"

    async def console(self, vm: VM, scrollback: int) -> ConsoleSession:
        self.calls.append(("console", vm.meta.id, scrollback))
        return Session()

    async def vnc(self, vm: VM) -> ByteStream:
        self.calls.append(("vnc", vm.meta.id))
        return Session()

    async def log(self, vm: VM, limit: int) -> bytes:
        self.calls.append(("log", vm.meta.id, limit))
        return b"booted\n"

    async def samples(self) -> Sequence[VMSample]:
        return []

    def held(self, template: str) -> Sequence[str]:
        return self.holding.get(template, [])

    async def measure(self, *, now: bool = False) -> Mapping[str, int]:
        return {}

    async def prepare_datastore(self, path: str, id: str) -> bool:
        return False

    async def forget_datastore(self, datastore: Datastore) -> None:
        pass

    async def check_volumes(self, repair: bool) -> CheckReport:
        return CheckReport(checked={"volumes": 1})

    async def check(self, repair: bool) -> CheckReport:
        self.calls.append(("check", repair))
        return CheckReport()

    async def catalogue(self) -> dict[str, CatalogueEntry]:
        return {}

    def read_export(self, path: Path, start: int, end: int) -> AsyncIterator[bytes]:
        raise NotImplementedError

    async def check_medium(self, path: str) -> None:
        self.calls.append(("check_medium", path))
        if "none" in path:
            raise NotFoundError(f"there is no file {path}", object=path)

    async def examine(self, source: ImportSource) -> Examined:
        self.calls.append(("examine", source))
        return self.examined

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
        self.calls.append(("changes", checkpoint.meta.id, disk, since))
        return Changes(size=1 << 20, extents=())

    def read_disk(
        self, vm: VM, checkpoint: Checkpoint, disk: int, offset: int, length: int
    ) -> AsyncIterator[bytes]:
        self.calls.append(("read_disk", checkpoint.meta.id, disk, offset, length))
        return _pieces()

    async def stream_backup(
        self, vm: VM, checkpoint: Checkpoint, id: str, description: str
    ) -> AsyncIterator[bytes]:
        yield b"an archive"

    async def archived(self, upload: str) -> Backup:
        raise NotFoundError(f"there is no upload {upload}")

    async def repository(self, path: str) -> str:
        self.calls.append(("repository", path))
        return "repo-0000000000000000"

    def upload_path(self, name: str) -> Path:
        return self._tmp / f"upload-{new_id('image').removeprefix('img-')}"


@dataclass
class World:
    """Operations on a real store, and the other side of them: what a host would write."""

    store: Store
    services: Services
    now: float = 1000.0
    operations: Operations = field(init=False)

    def __post_init__(self) -> None:
        self.context = Context(self.store, HOST, self.services, clock=lambda: self.now)
        self.operations = Operations(self.context)

    async def vm(self, ref: str) -> VM:
        return (await self.operations.vms.get(SYSTEM, ref)).record

    async def task(self, id: str) -> Task:
        return (await self.operations.tasks.get(SYSTEM, id)).record

    async def created(self, name: str, **values: Any) -> VM:
        """A VM that its host has made, switched off (or running with ``start``)."""
        task = await self.operations.vms.create(SYSTEM, VMCreate(name=name, **values))
        running = bool(values.get("start"))
        await self.done(task, VMState.RUNNING if running else VMState.STOPPED)
        return await self.vm(name)

    async def done(self, task: Task, state: VMState | None = None) -> None:
        """What the host writes when the task is done: it is final and off the queue."""
        await self.end(task.meta.id, TaskState.SUCCEEDED)

        def change(vm: VM) -> VM:
            status = vm.status if state is None else msgspec.structs.replace(vm.status, state=state)
            tasks = tuple(id for id in vm.tasks if id != task.meta.id)
            return msgspec.structs.replace(vm, status=status, tasks=tasks)

        await update(self.store, VM, task.spec.object.id, change)

    async def end(self, id: str, state: TaskState) -> None:
        await update(
            self.store,
            Task,
            id,
            lambda t: msgspec.structs.replace(
                t, status=msgspec.structs.replace(t.status, state=state)
            ),
        )

    async def put(self, ref: str, state: VMState, power: Power, tasks: tuple[str, ...] = ()) -> VM:
        """Puts a VM into a state, whatever came before."""
        vm = await self.vm(ref)
        wanted = msgspec.structs.replace(
            vm,
            spec=msgspec.structs.replace(vm.spec, power=power),
            status=msgspec.structs.replace(vm.status, state=state),
            tasks=tasks,
        )
        await self.store.transact(Transaction(puts=[Put(wanted)]))
        return wanted

    async def image(
        self,
        name: str,
        *,
        state: ImageState = ImageState.READY,
        defaults: ImageDefaults | None = None,
        **content: Any,
    ) -> Image:
        """An image, made long ago."""
        content.setdefault("disk", "disk.qcow2")
        content.setdefault("virtual_size", 1 << 30)
        image = Image(
            meta=Meta(id=new_id("image"), name=name, created=1.0),
            spec=ImageSpec(source=ImageSourceKind.BUILD, value=name),
            status=ImageStatus(
                state=state,
                digest="ab" * 32,
                content=ImageContent(defaults=defaults or ImageDefaults(), **content)
                if state is not ImageState.PENDING
                else None,
            ),
        )
        await self.store.transact(
            Transaction(puts=[Put(image)], claims=[Claim(scope("image"), name, image.meta.id)])
        )
        return image

    async def all(self, kind: type[Record]) -> list[Any]:
        return [item.record for item in (await self.store.list(kind)).items]

    async def check_invariants(self) -> None:
        """Whatever was asked, and whatever went wrong, this holds."""
        vms: list[VM] = await self.all(VM)
        volumes: list[Volume] = await self.all(Volume)
        tasks: dict[str, Task] = {task.meta.id: task for task in await self.all(Task)}
        assert len({vm.meta.name for vm in vms}) == len(vms)
        assert len({volume.meta.name for volume in volumes}) == len(volumes)
        ids = {vm.meta.id for vm in vms}
        for vm in vms:
            name = scope("vm", vm.meta.project)
            assert await self.store.resolve(name, vm.meta.name) == vm.meta.id
            assert len(set(vm.tasks)) == len(vm.tasks)
            for id in vm.tasks:
                assert tasks[id].spec.object.id == vm.meta.id
                assert not tasks[id].status.state.final
            for port in vm.spec.ports:
                for forward in port.forwards:
                    held = f"{forward.protocol}/{forward.host_port}"
                    assert forward.host_port
                    assert await self.store.resolve(f"port/{HOST}", held) == vm.meta.id
        for volume in volumes:
            assert await self.store.resolve(scope("volume"), volume.meta.name) == volume.meta.id
            assert volume.spec.vm in ids
            (owner,) = (vm for vm in vms if vm.meta.id == volume.spec.vm)
            assert volume.meta.id in {disk.volume for disk in owner.spec.disks}
            assert volume.meta.name == f"{owner.meta.name}-boot"
        queued = {id for vm in vms for id in vm.tasks}
        for task in tasks.values():
            if task.spec.object.kind == "vm" and not task.status.state.final:
                assert task.meta.id in queued, "nobody will ever see to this task"


def holding(*privileges: str) -> Caller:
    """Somebody with these privileges and no others."""
    return Caller("somebody", frozenset(privileges))
