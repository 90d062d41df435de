"""Creating a VM: what its image suggests and its user says, completed, checked and written."""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket

import msgspec

from undercroft.model.base import Meta
from undercroft.model.checks import check_ports, check_vm_spec
from undercroft.model.errors import (
    AlreadyExistsError,
    InvalidError,
    StaleError,
    UnavailableError,
    WrongStateError,
)
from undercroft.model.image import Image, ImageContent, ImageState
from undercroft.model.names import check_labels, check_name, new_id, new_mac
from undercroft.model.requests import VMCreate
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.vm import (
    VM,
    Cdrom,
    Disk,
    Display,
    Firmware,
    Forward,
    Guest,
    Machine,
    Port,
    Power,
    Protocol,
    VMSpec,
)
from undercroft.model.volume import Volume
from undercroft.operations.access import Caller
from undercroft.operations.cdroms import check_disc, new_drive
from undercroft.operations.context import Context, find, new_event, new_task, scope
from undercroft.operations.datastores import place_checks, place_id, place_new
from undercroft.operations.held import find_held
from undercroft.operations.vm_disks import NewDisks, new_disks
from undercroft.operations.warm import find_warm, going_on, warm_key
from undercroft.store.interface import Check, Claim, Put, Transaction, Versioned

HOST_PORTS = range(20000, 30000)  # where forwards without a stated host port are put
_MACHINES = {"x86_64": Machine.Q35, "i386": Machine.Q35}


async def create(context: Context, caller: Caller, request: VMCreate) -> Task:
    """Writes a new VM with its boot volume, names and ports, and the task that makes it real.

    Raises:
        InvalidError, UnsupportedError: the request makes no sense (see `check_vm_spec`).
        NotFoundError: no such image. WrongStateError: the image is not ready.
        AlreadyExistsError: the name, or a host port that was asked for, is taken.
    """
    caller.require("vm.create")
    if request.start:
        caller.require("vm.power")
    check_labels(request.labels)
    if request.name is not None:
        check_name(request.name)
    if request.project != "default":
        raise InvalidError(
            f"project {request.project[:40]!r} does not exist", action="leave the project out"
        )
    image, content = await _image(context, request)
    if request.encrypt and not _has_disk(request, content):
        raise InvalidError(
            "there is no disk to encrypt", action="give it one: --disk 10G, or leave --encrypt out"
        )
    for drive in request.cdroms:
        if drive.path is not None:
            await check_disc(context, caller, drive.path)
    where = await place_new(context, request.datastore)
    for attempt in range(20):
        name = request.name or _invent_name(request)
        vm, disks, forwards = await _compose(
            context,
            request,
            name,
            image.record if image else None,
            content,
            place_id(where),
        )
        arguments: dict[str, object] = {"start": request.start}
        warm = warm_key(request, vm, disks.made, content)
        template = await find_warm(context, warm) if warm is not None else None
        if warm is not None:
            arguments["warm"] = warm
        made, held = disks.made, None
        if template is not None:
            if not any(port.mac for port in request.ports or ()):
                held = await find_held(context, template.record.meta.id, made, skip=set())
            if held is not None:
                vm, made = held.become(vm, made)
            arguments |= going_on(template.record, vm)
        task = new_task(context, "vm.create", vm, caller.name, **arguments)
        vm = msgspec.structs.replace(vm, tasks=(task.meta.id,))
        event = new_event(
            context.clock(), "vm.created", vm, f"{vm.label} was created", by=caller.name
        )
        puts = [Put(vm), Put(task), Put(event)]
        claims = [Claim(scope("vm", vm.meta.project), name, vm.meta.id)]
        claims += [Claim(*port_claim(context.host, forward), vm.meta.id) for forward in forwards]
        puts += [Put(volume) for volume in made]
        puts += [Put(taken.record) for taken in disks.taken]
        claims += [Claim(scope("volume"), v.meta.name, v.meta.id) for v in made]
        checks = [Check(Image, image.record.meta.id, image.revision)] if image is not None else []
        checks += [Check(Volume, taken.record.meta.id, taken.revision) for taken in disks.taken]
        if template is not None:
            checks.append(Check(Template, template.record.meta.id, template.revision))
        checks += place_checks(where)
        checks += held.checks if held is not None else []
        releases = held.releases if held is not None else []
        try:
            await context.store.transact(
                Transaction(checks=checks, claims=claims, releases=releases, puts=puts)
            )
        except AlreadyExistsError as taken:
            if _is_ours_to_choose(taken, request) and attempt < 19:
                continue
            raise _explain_taken(taken, name) from None
        except StaleError:
            image, content = await _image(context, request)  # it changed: is it still ready?
            where = await place_new(context, request.datastore)
            continue
        return task
    raise StaleError("others keep interfering", object=f"image {request.image}", action="try again")


def _has_disk(request: VMCreate, content: ImageContent | None) -> bool:
    own = content is not None and content.disk is not None
    return own or request.disk is not None or bool(request.disks)


def port_claim(host: str, forward: Forward) -> tuple[str, str]:
    """Scope and name under which a host port is claimed."""
    return f"port/{host}", f"{forward.protocol}/{forward.host_port}"


async def assign_host_ports(
    context: Context,
    ports: tuple[Port, ...],
    given: set[tuple[Protocol, int]] | None = None,
) -> tuple[Port, ...]:
    """Gives a free host port to each forward that has none; those in ``given`` are not free, and
    what is given away is added to them.

    Raises:
        InvalidError: the ports make no sense, or an address is none of this host's.
        UnavailableError: none is free.
    """
    check_ports(ports)
    taken = given if given is not None else set()
    taken |= {(f.protocol, f.host_port) for port in ports for f in port.forwards if f.host_port}
    complete: list[Port] = []
    for port in ports:
        chosen: list[Forward] = []
        for forward in port.forwards:
            if forward.host_port == 0:
                number = await _free_port(context, forward, taken)
                forward = msgspec.structs.replace(forward, host_port=number)
                taken.add((forward.protocol, number))
            chosen.append(forward)
        complete.append(msgspec.structs.replace(port, forwards=tuple(chosen)))
    return tuple(complete)


async def _free_port(context: Context, forward: Forward, taken: set[tuple[Protocol, int]]) -> int:
    start = secrets.randbelow(len(HOST_PORTS))
    for offset in range(len(HOST_PORTS)):
        port = HOST_PORTS[(start + offset) % len(HOST_PORTS)]
        candidate = msgspec.structs.replace(forward, host_port=port)
        if (forward.protocol, port) in taken:
            continue
        if await context.store.resolve(*port_claim(context.host, candidate)) is not None:
            continue
        if await asyncio.to_thread(_bindable, candidate):
            return port
    raise UnavailableError("no port of the host is free to forward", action="remove some VMs")


def _bindable(forward: Forward) -> bool:
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind((forward.host_address, forward.host_port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InvalidError(
                    f"{forward.host_address} is not an address of this host",
                    action="forward from 127.0.0.1, or from 0.0.0.0 for all addresses",
                ) from None
            return False
    return True


async def _image(
    context: Context, request: VMCreate
) -> tuple[Versioned[Image] | None, ImageContent | None]:
    if request.image is None:
        return None, None
    found = await find(context.store, Image, request.image)
    image = found.record
    if image.status.state is not ImageState.READY or image.status.content is None:
        raise WrongStateError(
            f"{image.label} is {image.status.state}, not ready",
            object=image.label,
            action="wait for it: croft task ls",
            state=image.status.state,
        )
    return found, image.status.content


async def _compose(
    context: Context,
    request: VMCreate,
    name: str,
    image: Image | None,
    content: ImageContent | None,
    datastore: str | None,
) -> tuple[VM, NewDisks, tuple[Forward, ...]]:
    now = context.clock()
    id = new_id("vm")
    disks = await new_disks(context, request, name, id, image, content, datastore)
    ports = await _ports(context, request, content)
    spec = _spec(context, request, image, content, tuple(disks.disks), ports)
    check_vm_spec(spec)
    forwards = tuple(forward for port in ports for forward in port.forwards)
    meta = Meta(id=id, name=name, project=request.project, created=now, labels=request.labels)
    return VM(meta=meta, spec=spec), disks, forwards


def _spec(
    context: Context,
    request: VMCreate,
    image: Image | None,
    content: ImageContent | None,
    disks: tuple[Disk, ...],
    ports: tuple[Port, ...],
) -> VMSpec:
    arch = request.arch or (content.arch if content else "x86_64")
    if content is not None and arch != content.arch:
        raise InvalidError(
            f"the image is for {content.arch}, not for {arch}",
            object=image.label if image else None,
        )
    defaults = content.defaults if content else None
    machine = request.machine or (
        Machine(defaults.machine) if defaults else _MACHINES.get(arch, Machine.VIRT)
    )
    firmware = request.firmware or _firmware(
        request, machine, defaults.firmware if defaults else None
    )
    if firmware is Firmware.KERNEL and (content is None or content.kernel is None):
        raise InvalidError(
            "there is no kernel to boot directly: the image has none",
            object=image.label if image else None,
            action="use --firmware bios or uefi",
        )
    if firmware is not Firmware.KERNEL and request.kernel_arguments:
        raise InvalidError(
            "kernel arguments need direct boot", action="use --firmware kernel, or leave them out"
        )
    if firmware is not Firmware.KERNEL and content is not None and content.disk is None:
        raise InvalidError(
            f"{image.label if image else 'the image'} has no disk to boot from with {firmware}",
            action="use --firmware kernel",
        )
    drives: list[Cdrom] = []
    for wanted in request.cdroms:
        drives.append(new_drive(drives, wanted, machine, image.meta.id if image else None))
    display = request.display
    if display is None and defaults is not None and defaults.display is not None:
        display = Display(defaults.display)
    if display is None:
        display = Display.NONE if machine is Machine.MICROVM else Display.STD
        if machine is Machine.VIRT:
            display = Display.VIRTIO
    return VMSpec(
        host=context.host,
        power=Power.RUNNING if request.start else Power.STOPPED,
        cpus=request.cpus if request.cpus is not None else (defaults.cpus if defaults else 1),
        memory=request.memory
        if request.memory is not None
        else (defaults.memory if defaults else VMSpec(host="").memory),
        arch=arch,
        machine=machine,
        firmware=firmware,
        secure_boot=request.secure_boot,
        tpm=request.tpm,
        accelerator=request.accelerator,
        cpu_model=request.cpu_model,
        display=display,
        image=image.meta.id if image else None,
        kernel_arguments=request.kernel_arguments,
        disks=disks,
        cdroms=tuple(drives),
        boot=request.boot,
        ports=ports,
        guest=_guest(request, content),
        restart=request.restart,
        stop_timeout=request.stop_timeout,
    )


def _firmware(request: VMCreate, machine: Machine, suggested: str | None) -> Firmware:
    if request.secure_boot:
        return Firmware.UEFI
    if machine is Machine.MICROVM:
        return Firmware.KERNEL
    if suggested is not None:
        return Firmware(suggested)
    return Firmware.UEFI if machine is Machine.VIRT else Firmware.BIOS


def _guest(request: VMCreate, content: ImageContent | None) -> Guest:
    guest = request.guest
    told = guest.ssh_keys or guest.user_data or guest.password_hash or guest.user
    if content is not None and not content.cloud_init and told:
        raise InvalidError(
            f"image {request.image} does not run cloud-init, so it takes no user, key or user-data",
            object=f"image {request.image}",
            action="leave them out, or choose an image with cloud-init",
        )
    if guest.user is None and content is not None and content.cloud_init:
        guest = msgspec.structs.replace(guest, user=content.defaults.user)
    return guest


async def _ports(
    context: Context, request: VMCreate, content: ImageContent | None
) -> tuple[Port, ...]:
    ports = request.ports
    if ports is None:
        ports = (Port(),)
    if request.forwards and not ports:
        raise InvalidError("a VM without a network adapter cannot have forwarded ports")
    if ports:
        first = ports[0]
        forwards = (*first.forwards, *request.forwards)
        reaches_ssh = any(f.guest_port == 22 for f in forwards)
        if content is not None and content.ssh and not reaches_ssh:
            forwards = (*forwards, Forward(guest_port=22))
        ports = (msgspec.structs.replace(first, forwards=forwards), *ports[1:])
    ports = tuple(
        msgspec.structs.replace(port, mac=(port.mac or new_mac()).lower()) for port in ports
    )
    return await assign_host_ports(context, ports)


def _invent_name(request: VMCreate) -> str:
    base = "".join(c if c.isalnum() else "-" for c in (request.image or "vm").lower()).strip("-")
    return f"{base[:40] or 'vm'}-{secrets.token_hex(2)}"


def _is_ours_to_choose(taken: AlreadyExistsError, request: VMCreate) -> bool:
    """Whether another try may choose differently: an invented name or a chosen host port."""
    scope_of = str(taken.data.get("scope", ""))
    if scope_of.startswith("port/"):
        port = int(str(taken.data.get("name", "/0")).rpartition("/")[2])
        asked = [f.host_port for f in request.forwards]
        asked += [f.host_port for p in request.ports or () for f in p.forwards]
        return port not in asked
    return request.name is None


def _explain_taken(taken: AlreadyExistsError, name: str) -> AlreadyExistsError:
    if str(taken.data.get("scope", "")).startswith("port/"):
        port = str(taken.data.get("name", "")).rpartition("/")[2]
        return AlreadyExistsError(
            f"port {port} of this host is already forwarded to another VM",
            object=f"port {port}",
            action="choose another port",
        )
    return AlreadyExistsError(
        f"vm {name} already exists", object=f"vm {name}", action="choose another name"
    )
