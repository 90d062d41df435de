"""The disks that a VM is created with: its first, further ones, and volumes that are there."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from undercroft.model.base import Meta
from undercroft.model.errors import InvalidError
from undercroft.model.image import Image, ImageContent
from undercroft.model.names import new_id
from undercroft.model.requests import VMCreate
from undercroft.model.units import format_size
from undercroft.model.vm import Disk, DiskBus
from undercroft.model.volume import Volume, VolumeSpec, check_volume_size
from undercroft.operations.context import Context, find
from undercroft.operations.disks import check_free
from undercroft.operations.volume_use import check_idle
from undercroft.store.interface import Versioned


@dataclass
class NewDisks:
    """What a new VM gets: ``disks`` in their order, ``made`` for it, ``taken`` as they are."""

    disks: list[Disk] = field(default_factory=list)
    made: list[Volume] = field(default_factory=list)
    taken: list[Versioned[Volume]] = field(default_factory=list)

    def add(self, volume: Volume, bus: DiskBus, *, read_only: bool = False, first: bool) -> None:
        """One more disk. The first place is kept free for a disk that the VM was made with."""
        unit = 0 if first else 1 + sum(disk.unit > 0 for disk in self.disks)
        self.disks.append(Disk(volume=volume.meta.id, bus=bus, read_only=read_only, unit=unit))


async def new_disks(
    context: Context,
    request: VMCreate,
    name: str,
    vm: str,
    image: Image | None,
    content: ImageContent | None,
    datastore: str | None,
) -> NewDisks:
    """The disks of a VM that is to be created, in a ``datastore`` (an id).

    Raises:
        InvalidError: a size makes no sense. NotFoundError: there is no such volume.
        InUseError, WrongStateError, BusyError: a volume cannot be taken now.
    """
    found = NewDisks()
    boot = _boot_volume(context, request, name, vm, image, content, datastore)
    if boot is not None:
        found.made.append(boot)
        found.add(boot, request.disk_bus, first=True)
    for number, disk in enumerate(request.disks, start=2):
        volume = Volume(
            meta=Meta(id=new_id("volume"), name=f"{name}-disk{number}", created=context.clock()),
            spec=VolumeSpec(
                size=check_volume_size(disk.size),
                host=context.host,
                vm=vm,
                datastore=datastore,
                encrypted=request.encrypt,
            ),
        )
        found.made.append(volume)
        found.add(volume, disk.bus, first=False)
    for use in request.volumes:
        taken = await find(context.store, Volume, use.volume)
        if any(disk.volume == taken.record.meta.id for disk in found.disks):
            raise InvalidError(f"{taken.record.label} is given twice", object=taken.record.label)
        check_idle(taken.record)
        await check_free(context, taken.record)
        spec = msgspec.structs.replace(taken.record.spec, attached=vm)
        wanted = msgspec.structs.replace(taken.record, spec=spec)
        found.taken.append(Versioned(wanted, taken.revision))
        found.add(wanted, use.bus, read_only=use.read_only, first=False)
    return found


def _boot_volume(
    context: Context,
    request: VMCreate,
    name: str,
    vm: str,
    image: Image | None,
    content: ImageContent | None,
    datastore: str | None,
) -> Volume | None:
    base = content.virtual_size if content is not None and content.disk is not None else 0
    if request.disk is None and base == 0:
        return None
    size = request.disk if request.disk is not None else base
    check_volume_size(size)
    if size < base:
        raise InvalidError(
            f"a disk of {format_size(size)} is smaller than the image's {format_size(base)}",
            object=image.label if image else None,
            action="leave --disk out, or choose a larger one",
        )
    return Volume(
        meta=Meta(id=new_id("volume"), name=f"{name}-boot", created=context.clock()),
        spec=VolumeSpec(
            size=size,
            image=image.meta.id if image is not None and base else None,
            host=context.host,
            vm=vm,
            datastore=datastore,
            encrypted=request.encrypt,
        ),
    )
