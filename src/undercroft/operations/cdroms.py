"""CD-ROM drives of VMs, and the discs in them: files of the host."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from undercroft.model.checks import check_medium_path, check_vm_spec
from undercroft.model.errors import BusyError, InvalidError, NotFoundError, WrongStateError
from undercroft.model.requests import EjectRequest, InsertRequest, NewCdrom
from undercroft.model.task import Task
from undercroft.model.vm import MAX_CDROMS, VM, Cdrom, DiskBus, Machine, VMState
from undercroft.operations.access import Caller
from undercroft.operations.asking import Volumes, ask
from undercroft.operations.context import Context
from undercroft.operations.disks import check_changeable
from undercroft.operations.volume_use import waiting

Prepared = tuple[VM, dict[str, object]]


class CdromOperations:
    """insert, eject, add, remove."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def insert(self, caller: Caller, ref: str, drive: int, request: InsertRequest) -> Task:
        """Puts a disc into a drive of a VM, running or not, in place of what is in it.

        Raises:
            NotFoundError: there is no such drive or file. InvalidError: the file is no disc.
            WrongStateError: the VM is suspended, being made or removed.
        """
        caller.require("vm.change")
        await check_disc(self._context, caller, request.path)

        async def prepare(vm: VM, _: Volumes) -> Prepared:
            find_drive(vm, drive)
            check_changeable(vm)
            return vm, {"drive": drive, "path": request.path, "force": request.force}

        return await ask(self._context, caller, ref, "cdrom.insert", prepare)

    async def eject(self, caller: Caller, ref: str, drive: int, request: EjectRequest) -> Task:
        """Takes the disc out of a drive of a VM, running or not.

        Raises:
            NotFoundError: there is no such drive. WrongStateError: it is empty; or the VM is
                suspended (unless with ``force``), being made or removed.
        """
        caller.require("vm.change")

        async def prepare(vm: VM, _: Volumes) -> Prepared:
            held = find_drive(vm, drive)
            if not (request.force and vm.status.state is VMState.SUSPENDED):
                check_changeable(vm)
            if held.medium is None and not await waiting(self._context, vm, ("cdrom.insert",)):
                raise WrongStateError(f"drive {drive} of {vm.label} is empty", object=vm.label)
            return vm, {"drive": drive, "force": request.force}

        return await ask(self._context, caller, ref, "cdrom.eject", prepare)

    async def add(self, caller: Caller, ref: str, request: NewCdrom) -> Task:
        """Gives a VM, running or not, one more drive.

        Raises:
            InvalidError, UnsupportedError: it cannot have it.
            WrongStateError: the VM is suspended, being made or removed.
        """
        caller.require("vm.change")
        if request.path is not None:
            await check_disc(self._context, caller, request.path)

        async def prepare(vm: VM, _: Volumes) -> Prepared:
            check_changeable(vm)
            if busy := await waiting(self._context, vm, ("cdrom.add",)):
                raise BusyError(
                    f"{vm.label} is just being given a CD-ROM drive",
                    object=vm.label,
                    action="wait for it: croft task ls",
                    tasks=busy,
                )
            drives = vm.spec.cdroms
            made = new_drive(
                drives, request, vm.spec.machine, vm.spec.image, hot=vm.status.state.alive
            )
            check_vm_spec(msgspec.structs.replace(vm.spec, cdroms=(*drives, made)))
            return vm, {"drive": made.unit, "bus": made.bus.value, "path": made.medium}

        return await ask(self._context, caller, ref, "cdrom.add", prepare)

    async def remove(self, caller: Caller, ref: str, drive: int) -> Task:
        """Takes a drive away from a VM, running or not.

        Raises:
            NotFoundError: there is no such drive.
            WrongStateError: the VM is suspended, being made or removed.
        """
        caller.require("vm.change")

        async def prepare(vm: VM, _: Volumes) -> Prepared:
            find_drive(vm, drive)
            check_changeable(vm)
            return vm, {"drive": drive}

        return await ask(self._context, caller, ref, "cdrom.remove", prepare)


async def check_disc(context: Context, caller: Caller, path: str) -> None:
    """Does nothing if a caller can have a file of the host put into a drive.

    Raises:
        ForbiddenError: they may not name files of the host.
        NotFoundError, InvalidError: there is no such file, or it is no disc.
    """
    caller.require("host.files")
    await context.services.check_medium(check_medium_path(path))


def new_drive(
    drives: Sequence[Cdrom],
    request: NewCdrom,
    machine: Machine,
    image: str | None,
    *,
    hot: bool = False,
) -> Cdrom:
    """One more drive; ``hot``: it comes to a running guest. What is to be installed from a disc
    knows SATA; the kernels of images for clouds often do not, and have their disks on virtio, too.

    Raises:
        InvalidError: there are too many.
    """
    taken = {drive.unit for drive in drives}
    unit = next((n for n in range(MAX_CDROMS) if n not in taken), None)
    if unit is None:
        raise InvalidError(f"a VM has at most {MAX_CDROMS} CD-ROM drives")
    sata = machine is Machine.Q35 and image is None and not hot
    default = DiskBus.SATA if sata else DiskBus.SCSI
    return Cdrom(bus=request.bus or default, medium=request.path, unit=unit)


def find_drive(vm: VM, unit: int) -> Cdrom:
    """A drive of a VM.

    Raises:
        NotFoundError: it has no such drive.
    """
    for drive in vm.spec.cdroms:
        if drive.unit == unit:
            return drive
    known = ", ".join(str(drive.unit) for drive in vm.spec.cdroms)
    raise NotFoundError(
        f"{vm.label} has no CD-ROM drive{f' {unit}' if known else ''}",
        object=f"cdrom {vm.meta.name}",
        action=f"it has: {known}" if known else f"give it one: croft cdrom add {vm.meta.name}",
    )
