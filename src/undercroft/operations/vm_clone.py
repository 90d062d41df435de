"""Cloning: new VMs that begin as what another is, or as what a template has kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from undercroft.model.base import Meta, Record
from undercroft.model.checks import check_can_be_saved, check_moment, check_vm_spec
from undercroft.model.errors import (
    AlreadyExistsError,
    DataError,
    InvalidError,
    StaleError,
    WrongStateError,
)
from undercroft.model.image import Image
from undercroft.model.names import check_labels, check_name, new_id, new_mac
from undercroft.model.requests import CloneMode, CloneRequest
from undercroft.model.task import Task
from undercroft.model.template import Template, TemplateSpec, TemplateState
from undercroft.model.vm import VM, Disk, Port, Power, Protocol, VMSpec, VMState
from undercroft.model.volume import Volume, VolumeSpec
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    check_queue,
    find,
    new_event,
    new_task,
    scope,
)
from undercroft.operations.datastores import place, place_checks
from undercroft.operations.freezing import freezing_task
from undercroft.operations.held import find_held
from undercroft.operations.vm_create import assign_host_ports, port_claim
from undercroft.operations.vm_power import check_present
from undercroft.operations.volume_use import check_settled
from undercroft.store.interface import Check, Claim, Put, Release, Transaction

MOST = 1000  # clones of one request
_NAME_ROOM = 58  # of the 63 characters that a name may have; the rest is for the number


@dataclass
class _Source:
    """What clones begin as: the shape, the sizes and images of the disks, and where it comes from.
    ``making`` is the task that freezes it first, if that is not done."""

    record: Record
    name: str
    shape: VMSpec
    disks: Sequence[tuple[Disk, int, str | None]]
    template: str
    project: str = "default"
    making: Task | None = None
    checks: list[Check] = field(default_factory=list)
    puts: list[Put] = field(default_factory=list)


async def clone_vm(context: Context, caller: Caller, ref: str, request: CloneRequest) -> list[Task]:
    """Clones a VM, running or not: it is frozen as it is at one moment, and goes on unharmed.

    Raises:
        InvalidError: the request makes no sense. AlreadyExistsError: a name is taken.
        WrongStateError: an instant clone is wanted of a VM that does not run.
    """
    _check(caller, request)
    for _ in range(ATTEMPTS):
        found = await find(context.store, VM, ref)
        vm = found.record
        check_present(vm)
        check_queue(vm)
        await check_settled(context, vm)
        if vm.status.state is VMState.CREATING:
            raise WrongStateError(
                f"{vm.label} is being made", object=vm.label, action="wait until it is there"
            )
        mode = request.mode or CloneMode.LINKED
        instant = mode is CloneMode.INSTANT
        check_moment(instant, request.quiesce)
        if instant and not vm.status.state.alive:
            raise WrongStateError(
                f"{vm.label} is {vm.status.state}: an instant clone goes on from what its source "
                "has in memory",
                object=vm.label,
                action=f"start it first, or: croft clone {vm.meta.name} NAME --linked",
                state=vm.status.state,
            )
        if instant:
            check_can_be_saved(vm, "clone")
        template = Template(
            meta=Meta(
                id=(id := new_id("template")),
                name=id,
                project=vm.meta.project,
                created=context.clock(),
            ),
            spec=TemplateSpec(
                host=context.host,
                source=vm.meta.id,
                memory=instant,
                quiesce=request.quiesce,
                passing=True,
            ),
        )
        making = freezing_task(context, template, vm, caller.name)
        source = _Source(
            record=vm,
            name=vm.meta.name,
            shape=vm.spec,
            disks=[(disk, *await _volume(context, vm, disk)) for disk in vm.spec.disks],
            template=template.meta.id,
            project=vm.meta.project,
            making=making,
            checks=[Check(VM, vm.meta.id, found.revision)],
            puts=[
                Put(msgspec.structs.replace(vm, tasks=(*vm.tasks, making.meta.id))),
                Put(template),
                Put(making),
            ],
        )
        try:
            return await _write(context, caller, source, request, mode)
        except StaleError:
            continue
    raise StaleError(f"others keep changing vm {ref}", object=f"vm {ref}", action="try again")


async def clone_template(
    context: Context, caller: Caller, ref: str, request: CloneRequest
) -> list[Task]:
    """Makes VMs from a template.

    Raises:
        InvalidError: the request makes no sense. AlreadyExistsError: a name is taken.
        WrongStateError: the template is not ready, or has no memory for an instant clone.
    """
    _check(caller, request)
    for _ in range(ATTEMPTS):
        found = await find(context.store, Template, ref)
        template = found.record
        status = template.status
        if status.state is not TemplateState.READY or status.shape is None:
            raise WrongStateError(
                f"{template.label} is just being made",
                object=template.label,
                action="wait for it: croft task ls",
                state=status.state,
            )
        mode = request.mode or (CloneMode.INSTANT if status.memory else CloneMode.LINKED)
        if mode is CloneMode.INSTANT and not status.memory:
            raise WrongStateError(
                f"{template.label} has no memory to go on from",
                object=template.label,
                action="use --linked, or make a template with --memory",
            )
        source = _Source(
            record=template,
            name=template.meta.name,
            shape=status.shape,
            disks=[(disk.disk, disk.size, disk.image) for disk in status.disks],
            template=template.meta.id,
            project=template.meta.project,
            checks=[Check(Template, template.meta.id, found.revision)],
        )
        try:
            return await _write(context, caller, source, request, mode)
        except StaleError:
            continue
    raise StaleError(f"others keep changing template {ref}", action="try again")


def _check(caller: Caller, request: CloneRequest) -> None:
    caller.require("vm.create")
    if request.start or request.mode is CloneMode.INSTANT:
        caller.require("vm.power")
    check_labels(request.labels)
    for name in request.names:
        check_name(name)
    if len(set(request.names)) != len(request.names):
        raise InvalidError("a name is given twice", action="give each clone a name of its own")
    if request.names and request.count not in (1, len(request.names)):
        raise InvalidError(
            f"{len(request.names)} names for {request.count} clones",
            action="give names or a count",
        )
    if not 1 <= max(request.count, len(request.names)) <= MOST:
        raise InvalidError(
            f"{request.count} clones are not possible", action=f"ask for 1 to {MOST}"
        )
    if request.mode is CloneMode.INSTANT and (request.cpus or request.memory):
        raise InvalidError(
            "an instant clone goes on with the CPUs and memory of its source",
            action="leave them out, or use --linked",
        )


async def _volume(context: Context, vm: VM, disk: Disk) -> tuple[int, str | None]:
    found = await context.store.get(Volume, disk.volume)
    if found is None:
        raise DataError(f"volume {disk.volume} of {vm.label} is gone", object=vm.label)
    return found.record.spec.size, found.record.spec.image


async def _write(
    context: Context, caller: Caller, source: _Source, request: CloneRequest, mode: CloneMode
) -> list[Task]:
    if request.encrypted is False and mode is not CloneMode.FULL:
        raise InvalidError(
            "only a full clone can be without encryption",
            action="say --full, or leave --decrypt out",
        )
    names = request.names or await _free_names(context, source, request.count)
    checks, puts, claims = list(source.checks), list(source.puts), list[Claim]()
    where = await place(context, request.datastore)
    checks += place_checks(where)
    image = source.shape.image
    if image is not None:
        found = await context.store.get(Image, image)
        if found is None:
            raise DataError(f"image {image} is gone", object=f"image {image}")
        checks.append(Check(Image, image, found.revision))
    ports = await _ports(context, source.shape.ports, len(names))
    tasks: list[Task] = []
    releases: list[Release] = []
    waiting = set[str]()  # those that were found
    for name, own in zip(names, ports, strict=True):
        datastore = where.record.meta.id if where is not None else None
        vm, volumes = _compose(context, source, request, mode, name, own, datastore)
        if mode is CloneMode.INSTANT and source.making is None:
            held = await find_held(context, source.template, volumes, waiting)
            if held is not None:
                vm, volumes = held.become(vm, volumes)
                own = vm.spec.ports
                checks += held.checks
                releases += held.releases
        macs = {old.mac: new.mac for old, new in zip(source.shape.ports, own, strict=True)}
        arguments: dict[str, object] = {
            "template": source.template,
            "source": source.record.label,
            "mode": mode.value,
            "macs": macs,
            "start": request.start,
        }
        if request.encrypted is not None:
            arguments["encrypted"] = request.encrypted
        if source.making is not None:
            arguments["waits"] = source.making.meta.id
        task = new_task(context, "vm.create", vm, caller.name, **arguments)
        vm = msgspec.structs.replace(vm, tasks=(task.meta.id,))
        told = f"{vm.label} is to be a {mode.value} clone of {source.record.label}"
        event = new_event(context.clock(), "vm.created", vm, told, by=caller.name)
        puts += [Put(vm), Put(task), Put(event), *(Put(volume) for volume in volumes)]
        claims.append(Claim(scope("vm", vm.meta.project), name, vm.meta.id))
        claims += [Claim(scope("volume"), v.meta.name, v.meta.id) for v in volumes]
        claims += [
            Claim(*port_claim(context.host, forward), vm.meta.id)
            for port in own
            for forward in port.forwards
        ]
        tasks.append(task)
    try:
        await context.store.transact(
            Transaction(checks=checks, claims=claims, releases=releases, puts=puts)
        )
    except AlreadyExistsError as taken:
        what = str(taken.data.get("name", ""))
        if str(taken.data.get("scope", "")).startswith("port/") or what not in request.names:
            raise StaleError(f"{what} was taken meanwhile") from None  # choose again
        raise AlreadyExistsError(
            f"vm {what} already exists", object=f"vm {what}", action="choose another name"
        ) from None
    return tasks


def _compose(
    context: Context,
    source: _Source,
    request: CloneRequest,
    mode: CloneMode,
    name: str,
    ports: tuple[Port, ...],
    datastore: str | None,
) -> tuple[VM, list[Volume]]:
    now = context.clock()
    id = new_id("vm")
    volumes = [
        Volume(
            meta=Meta(
                id=new_id("volume"),
                name=f"{name}-boot" if index == 0 else f"{name}-disk{index + 1}",
                created=now,
            ),
            spec=VolumeSpec(
                size=size,
                image=image,
                host=context.host,
                vm=id,
                datastore=datastore,
                encrypted=bool(request.encrypted),
            ),
        )
        for index, (_, size, image) in enumerate(source.disks)
    ]
    disks = tuple(
        msgspec.structs.replace(disk, volume=volume.meta.id)
        for (disk, _, _), volume in zip(source.disks, volumes, strict=True)
    )
    shape = source.shape
    runs = request.start or mode is CloneMode.INSTANT
    spec = msgspec.structs.replace(
        shape,
        host=context.host,
        power=Power.RUNNING if runs else Power.STOPPED,
        cpus=request.cpus or shape.cpus,
        memory=request.memory or shape.memory,
        disks=disks,
        ports=ports,
        guest=msgspec.structs.replace(shape.guest, hostname=request.hostname),
    )
    check_vm_spec(spec)
    meta = Meta(id=id, name=name, project=source.project, created=now, labels=request.labels)
    return VM(meta=meta, spec=spec), volumes


async def _ports(context: Context, ports: tuple[Port, ...], count: int) -> list[tuple[Port, ...]]:
    """For each clone the source's adapters, with addresses and host ports of its own."""
    given: set[tuple[Protocol, int]] = set()
    complete = []
    for _ in range(count):
        fresh = tuple(
            msgspec.structs.replace(
                port,
                mac=new_mac(),
                forwards=tuple(msgspec.structs.replace(f, host_port=0) for f in port.forwards),
            )
            for port in ports
        )
        complete.append(await assign_host_ports(context, fresh, given))
    return complete


async def _free_names(context: Context, source: _Source, count: int) -> tuple[str, ...]:
    """The next of NAME-1, NAME-2, …"""
    base = source.name.replace(":", "-").replace("_", "-")[:_NAME_ROOM].rstrip("-.")
    names: list[str] = []
    number = 0
    while len(names) < count:
        number += 1
        name = f"{base}-{number}"
        if await context.store.resolve(scope("vm", source.project), name) is None:
            names.append(name)
    return tuple(names)
