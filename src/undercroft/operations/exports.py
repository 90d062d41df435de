"""Exports: VMs, snapshots and templates as files."""

from __future__ import annotations

import builtins
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from undercroft.model.base import Meta, Record
from undercroft.model.errors import (
    DataError,
    InvalidError,
    NotFoundError,
    StaleError,
    UnsupportedError,
    WrongStateError,
)
from undercroft.model.export import Export, ExportFile, ExportFormat, ExportSpec, ExportState
from undercroft.model.layer import Layer
from undercroft.model.names import is_id, new_id
from undercroft.model.snapshot import Snapshot, SnapshotState
from undercroft.model.task import Task
from undercroft.model.template import (
    Template,
    TemplateDisk,
    TemplateSpec,
    TemplateState,
    TemplateStatus,
)
from undercroft.model.transfer import ExportCreate
from undercroft.model.vm import VM, VMSpec, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    check_queue,
    find,
    new_event,
    new_task,
    snapshot_scope,
)
from undercroft.operations.freezing import freezing_task
from undercroft.operations.vm_power import check_present
from undercroft.operations.volume_use import check_settled
from undercroft.store.interface import Check, Delete, Listing, Put, Transaction, Versioned

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ExportOperations:
    """Every verb on exports."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self, caller: Caller) -> Listing[Export]:
        """All exports that have not been removed."""
        caller.require("export.view")
        return await self._context.store.list(Export)

    async def get(self, caller: Caller, ref: str) -> Versioned[Export]:
        """The export with this id."""
        caller.require("export.view")
        return await find(self._context.store, Export, ref)

    async def create(self, caller: Caller, request: ExportCreate) -> Task:
        """Writes a VM as it is at this moment, one of its snapshots, or a template into files. The
        VM goes on unharmed. The task's ``spec.object`` is the export.

        Raises:
            InvalidError: the request makes no sense. WrongStateError: it is just being made.
        """
        caller.require("export.create")
        _check(request)
        for _ in range(ATTEMPTS):
            checks: list[Check] = []
            puts: list[Put] = []
            making: Task | None = None
            besides: str | None = None
            if request.template is not None:
                source, template, besides = await self._template(request.template, checks)
            elif request.snapshot is not None:
                source, template, besides = await self._snapshot(request, checks)
            else:
                source, template, making = await self._vm(caller, request, checks, puts)
            _check_disk(template, request)
            await _check_readable(self._context, source, template)
            export = Export(
                meta=Meta(
                    id=(id := new_id("export")),
                    name=id,
                    project=template.meta.project,
                    created=self._context.clock(),
                ),
                spec=ExportSpec(
                    source=source.label,
                    template=template.meta.id,
                    format=request.format,
                    vmdk=request.vmdk,
                    disk=request.disk,
                    file=request.file or _file_name(source.meta.name),
                    checksums=request.checksums,
                    host=self._context.host,
                ),
            )
            arguments: dict[str, object] = {"template": template.meta.id}
            if making is not None:
                arguments["waits"] = making.meta.id
            if besides is not None:  # what belongs to it besides disks, from the data directory on
                arguments["besides"] = besides
            task = new_task(self._context, "export.create", export, caller.name, **arguments)
            export = msgspec.structs.replace(export, tasks=(task.meta.id,))
            event = new_event(
                self._context.clock(),
                "export.created",
                export,
                f"{source.label} is being exported as {request.format}",
                by=caller.name,
            )
            puts += [Put(template), Put(export), Put(task), Put(event)]
            try:
                await self._context.store.transact(Transaction(checks=checks, puts=puts))
            except StaleError:
                continue
            return task
        raise StaleError("others keep changing it", action="try again")

    async def remove(self, caller: Caller, ref: str) -> Export:
        """Removes an export; one that is still being made is given up.

        Raises:
            NotFoundError: there is none.
        """
        caller.require("export.remove")
        store = self._context.store
        for _ in range(ATTEMPTS):
            found = await find(store, Export, ref)
            export = found.record
            checks = [Check(Export, export.meta.id, found.revision)]
            puts: list[Put] = []
            deletes: list[Delete] = [Delete(Export, export.meta.id)]
            for id in export.tasks:
                task = await store.get(Task, id)
                if task is None or task.record.status.state.final:
                    continue
                spec = msgspec.structs.replace(task.record.spec, cancel=True)
                checks.append(Check(Task, id, task.revision))
                puts.append(Put(msgspec.structs.replace(task.record, spec=spec)))
                deletes = []  # its worker removes it
            try:
                await store.transact(Transaction(checks=checks, puts=puts, deletes=deletes))
            except StaleError:
                continue
            return export
        raise StaleError(f"others keep changing export {ref}", action="try again")

    async def content(
        self, caller: Caller, ref: str, name: str, start: int, end: int | None
    ) -> tuple[ExportFile, AsyncIterator[bytes]]:
        """A file of an export, and its bytes from ``start`` up to ``end`` (None: all).

        Raises:
            NotFoundError: it has no such file. WrongStateError: it is not ready.
        """
        caller.require("export.view")
        export = (await find(self._context.store, Export, ref)).record
        if export.status.state is not ExportState.READY:
            raise WrongStateError(
                f"{export.label} is still being made",
                object=export.label,
                action="wait for it: croft task ls",
            )
        file = next((file for file in export.status.files if file.name == name), None)
        if file is None:
            raise NotFoundError(f"{export.label} has no file {name[:80]}", object=export.label)
        stop = file.size if end is None else min(end, file.size)
        return file, self._context.services.read_export(Path(file.path), start, stop)

    async def _vm(
        self,
        caller: Caller,
        request: ExportCreate,
        checks: builtins.list[Check],
        puts: builtins.list[Put],
    ) -> tuple[Record, Template, Task]:
        context = self._context
        found = await find(context.store, VM, str(request.vm))
        vm = found.record
        check_present(vm)
        check_queue(vm)
        await check_settled(context, vm)
        if vm.status.state is VMState.CREATING:
            raise WrongStateError(
                f"{vm.label} is being made", object=vm.label, action="wait until it is there"
            )
        template = self._passing(vm, quiesce=request.quiesce)
        making = freezing_task(context, template, vm, caller.name)
        checks.append(Check(VM, vm.meta.id, found.revision))
        puts.append(Put(msgspec.structs.replace(vm, tasks=(*vm.tasks, making.meta.id))))
        puts.append(Put(making))
        disks = [TemplateDisk(layer="", size=0, image=None, disk=disk) for disk in vm.spec.disks]
        status = TemplateStatus(shape=vm.spec, disks=tuple(disks))
        return vm, msgspec.structs.replace(template, status=status), making

    async def _snapshot(
        self, request: ExportCreate, checks: builtins.list[Check]
    ) -> tuple[Record, Template, str]:
        store = self._context.store
        vm = (await find(store, VM, str(request.vm))).record
        ref = str(request.snapshot)
        id: str | None = ref
        if not is_id(ref):
            id = await store.resolve(snapshot_scope(vm.meta.id), ref) if ref.isascii() else None
        found = await store.get(Snapshot, id) if id is not None else None
        if found is None or found.record.spec.vm != vm.meta.id or found.record.spec.passing:
            raise NotFoundError(
                f"{vm.label} has no snapshot {ref[:80]}",
                object=f"snapshot {ref[:80]}",
                action=f"see what exists with: croft snapshot ls {vm.meta.name}",
            )
        snapshot = found.record
        shape = snapshot.status.shape
        if snapshot.status.state is not SnapshotState.READY or shape is None:
            raise WrongStateError(
                f"{snapshot.label} is just being taken",
                object=snapshot.label,
                action="wait for it: croft task ls",
            )
        disks = []
        for disk, kept in zip(shape.disks, snapshot.status.disks, strict=True):
            volume = await store.get(Volume, disk.volume)
            if volume is None:
                raise DataError(f"volume {disk.volume} of {vm.label} is gone", object=vm.label)
            spec = volume.record.spec
            layer = await store.get(Layer, kept.layer)  # the volume may have grown since
            size = spec.size if layer is None else layer.record.spec.size
            disks.append(TemplateDisk(layer=kept.layer, size=size, image=spec.image, disk=disk))
        checks.append(Check(Snapshot, snapshot.meta.id, found.revision))
        besides = f"vms/{vm.meta.id}/snapshots/{snapshot.meta.id}"
        return vm, _ready(self._passing(vm), shape, tuple(disks)), besides

    async def _template(
        self, ref: str, checks: builtins.list[Check]
    ) -> tuple[Record, Template, str]:
        found = await find(self._context.store, Template, ref)
        source = found.record
        shape = source.status.shape
        if source.status.state is not TemplateState.READY or shape is None:
            raise WrongStateError(
                f"{source.label} is just being made",
                object=source.label,
                action="wait for it: croft task ls",
            )
        checks.append(Check(Template, source.meta.id, found.revision))
        template = _ready(self._passing(source), shape, source.status.disks)
        return source, template, f"templates/{source.meta.id}"

    def _passing(self, source: Record, *, quiesce: bool = False) -> Template:
        """A template that holds what is exported until that is done."""
        return Template(
            meta=Meta(
                id=(id := new_id("template")),
                name=id,
                project=source.meta.project,
                created=self._context.clock(),
            ),
            spec=TemplateSpec(
                host=self._context.host,
                source=source.meta.id,
                quiesce=quiesce,
                passing=True,
            ),
        )


def _check_disk(template: Template, request: ExportCreate) -> None:
    """Raises `InvalidError` if there is no such disk."""
    count = len(template.status.disks)
    if not request.format.whole and not 0 <= request.disk < count:
        raise InvalidError(
            f"there is no disk {request.disk}: it has {count}", action="disks are counted from 0"
        )


def _ready(template: Template, shape: VMSpec, disks: tuple[TemplateDisk, ...]) -> Template:
    status = TemplateStatus(state=TemplateState.READY, disks=disks, shape=shape)
    return msgspec.structs.replace(template, status=status)


def _check(request: ExportCreate) -> None:
    if (request.vm is None) == (request.template is None):
        raise InvalidError("name a VM or a template", action="give one of vm and template")
    if request.snapshot is not None and request.vm is None:
        raise InvalidError("only VMs have snapshots", action="leave the snapshot out")
    if request.quiesce and (request.snapshot is not None or request.vm is None):
        raise InvalidError("what is frozen already cannot be put in order", action="leave it out")
    if request.file is not None and _FILE.fullmatch(request.file) is None:
        raise InvalidError(
            f"{request.file[:60]!r} cannot be the name of a file in a package",
            action="use letters, digits, '-', '_' and '.'",
        )
    if request.disk and request.format in (ExportFormat.OVA, ExportFormat.OVF):
        raise InvalidError(
            f"an {request.format} holds all disks", action="leave the disk out, or choose a format"
        )


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:64].strip("-._") or "disk"


async def _check_readable(context: Context, source: Record, template: Template) -> None:
    """Whoever encrypts a disk does not want it written in the clear by the way."""
    for disk in template.status.disks:
        head = disk.layer
        if not head:  # it is frozen only later
            volume = await context.store.get(Volume, disk.disk.volume)
            head = volume.record.status.head if volume is not None else ""
        layer = await context.store.get(Layer, head) if head else None
        if layer is not None and layer.record.spec.encrypted:
            name = source.meta.name
            raise UnsupportedError(
                f"{source.label} has an encrypted disk, which is not written into a file as it is",
                object=source.label,
                action=f"export a copy without encryption: croft clone {name} NAME --full "
                "--decrypt, then croft export NAME",
            )
