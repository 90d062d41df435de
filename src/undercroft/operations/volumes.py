"""Volumes that stand for themselves: making, looking, removing. Those of VMs come with them."""

from __future__ import annotations

import msgspec

from undercroft.model.base import Meta
from undercroft.model.errors import (
    AlreadyExistsError,
    InUseError,
    InvalidError,
    StaleError,
    WrongStateError,
)
from undercroft.model.image import Image, ImageState
from undercroft.model.layer import LayerFormat
from undercroft.model.names import PREFIX, check_labels, check_name, is_id, new_id
from undercroft.model.requests import LayerTree, VolumeClone, VolumeCreate
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task
from undercroft.model.units import format_size
from undercroft.model.vm import VM
from undercroft.model.volume import Volume, VolumeSpec, VolumeState, check_volume_size
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    find,
    new_event,
    new_task,
    pending,
    scope,
)
from undercroft.operations.datastores import place_checks, place_id, place_new
from undercroft.operations.disks import DiskOperations
from undercroft.operations.volume_clone import clone_volume, flatten_volume
from undercroft.operations.volume_tree import layer_tree
from undercroft.operations.volume_use import already_exists, check_idle, users_of
from undercroft.store.interface import Check, Claim, Listing, Put, Transaction, Versioned


class VolumeOperations(DiskOperations):
    """Every verb on volumes."""

    async def get(self, caller: Caller, ref: str) -> Versioned[Volume]:
        """The volume with this name or id."""
        caller.require("volume.view")
        await self._context.services.measure()
        return await find(self._context.store, Volume, ref)

    async def list(self, caller: Caller) -> Listing[Volume]:
        """All volumes but those of VMs that come and go by themselves (warm ones, held ones)."""
        caller.require("volume.view")
        await self._context.services.measure()
        store = self._context.store
        vms = (await store.list(VM)).items
        passing = {item.record.meta.id for item in vms if item.record.spec.passing}
        listing = await store.list(Volume)
        items = [item for item in listing.items if item.record.spec.vm not in passing]
        return Listing(items, listing.revision)

    async def tree(self, caller: Caller) -> LayerTree:
        """All layers, and who needs them."""
        caller.require("volume.view")
        return await layer_tree(self._context)

    async def clone(self, caller: Caller, ref: str, request: VolumeClone) -> Task:
        """Makes a volume that begins as this one is."""
        return await clone_volume(self._context, caller, ref, request)

    async def flatten(self, caller: Caller, ref: str) -> Task:
        """Has a volume take over all that it lies on, so that it needs nothing of others."""
        return await flatten_volume(self._context, caller, ref)

    async def create(self, caller: Caller, request: VolumeCreate) -> Task:
        """Writes a new volume and the task that makes it. What begins as a volume is a clone.

        Raises:
            InvalidError: the name or the size makes no sense, or is smaller than its source.
            NotFoundError: no such source. WrongStateError: the source is not ready.
            AlreadyExistsError: the name is taken.
        """
        caller.require("volume.create")
        check_name(request.name, "volume")
        check_labels(request.labels)
        context = self._context
        if request.encrypt and request.format is not LayerFormat.QCOW2:
            raise InvalidError(
                "an encrypted volume is a qcow2 one", action="leave --format out, or --encrypt"
            )
        if request.source is not None and await _is_volume(context, request.source):
            if request.preallocate or request.format is not LayerFormat.QCOW2:
                raise InvalidError(
                    "a volume that begins as another is a thin qcow2 one",
                    action="leave --preallocate and --format out",
                )
            copy = VolumeClone(
                name=request.name,
                size=request.size,
                datastore=request.datastore,
                encrypted=request.encrypt or None,
                labels=request.labels,
            )
            return await clone_volume(context, caller, request.source, copy)
        for _ in range(ATTEMPTS):
            image = await _ready_image(context, request.source) if request.source else None
            where = await place_new(context, request.datastore)
            size = _size(request, image.record if image else None)
            now = context.clock()
            volume = Volume(
                meta=Meta(
                    id=new_id("volume"), name=request.name, created=now, labels=request.labels
                ),
                spec=VolumeSpec(
                    size=size,
                    image=image.record.meta.id if image else None,
                    host=context.host,
                    preallocated=request.preallocate,
                    format=request.format,
                    datastore=place_id(where),
                    encrypted=request.encrypt,
                ),
            )
            task = new_task(context, "volume.create", volume, caller.name)
            volume = msgspec.structs.replace(volume, tasks=(task.meta.id,))
            event = new_event(
                now, "volume.created", volume, f"{volume.label} is being made", by=caller.name
            )
            checks = [Check(Image, image.record.meta.id, image.revision)] if image else []
            try:
                await context.store.transact(
                    Transaction(
                        checks=[*checks, *place_checks(where)],
                        claims=[Claim(scope("volume"), request.name, volume.meta.id)],
                        puts=[Put(volume), Put(task), Put(event)],
                    )
                )
            except StaleError:
                continue
            except AlreadyExistsError:
                raise already_exists(request.name) from None
            return task
        raise StaleError(f"others keep changing image {request.source}", action="try again")

    async def remove(self, caller: Caller, ref: str) -> Task:
        """Removes a volume with what is on it. What others share with it stays.

        Raises:
            InUseError: a VM has it, or a snapshot of a VM would bring it back.
            BusyError: something is being done with it.
        """
        caller.require("volume.remove")
        store = self._context.store
        for _ in range(ATTEMPTS):
            found = await find(store, Volume, ref)
            volume = found.record
            same = await pending(store, volume, ("volume.remove",))
            if same is not None:
                return same
            await self._check_unused(volume)
            check_idle(volume)
            task = new_task(self._context, "volume.remove", volume, caller.name)
            status = msgspec.structs.replace(volume.status, state=VolumeState.REMOVING)
            wanted = msgspec.structs.replace(volume, status=status, tasks=(task.meta.id,))
            try:
                await store.transact(
                    Transaction(
                        checks=[Check(Volume, volume.meta.id, found.revision)],
                        puts=[Put(wanted), Put(task)],
                    )
                )
            except StaleError:
                continue
            return task
        raise StaleError(f"others keep changing volume {ref}", object=f"volume {ref}")

    async def _check_unused(self, volume: Volume) -> None:
        users = await users_of(self._context, volume)
        if users:
            names, remedies = [], []
            for user in users[:5]:
                if isinstance(user, Snapshot):
                    vm = await self._context.store.get(VM, user.spec.vm)
                    of = vm.record.meta.name if vm is not None else user.spec.vm
                    names.append(f"{user.label} of vm {of}")
                    remedies.append(
                        f"remove the snapshot, which needs it: croft snapshot rm {of} "
                        f"{user.meta.name}"
                    )
                    continue
                names.append(user.label)
                remedy = f"detach it first: croft volume detach {volume.meta.name}"
                if volume.spec.vm == user.meta.id:
                    remedy = f"it goes with its VM: croft rm {user.meta.name}; or {remedy}"
                remedies.append(remedy)
            told = ", ".join(names) + (" and others" if users[5:] else "")
            raise InUseError(
                f"{volume.label} is used by {told}",
                object=volume.label,
                action="\n".join(remedies),
                users=[user.meta.id for user in users],
            )


async def _is_volume(context: Context, ref: str) -> bool:
    if is_id(ref):
        return ref.startswith(PREFIX["volume"])
    volume = await context.store.resolve(scope("volume"), ref) if ref.isascii() else None
    image = await context.store.resolve(scope("image"), ref) if ref.isascii() else None
    if volume is not None and image is not None:
        raise InvalidError(
            f"{ref} is the name of an image and of a volume",
            object=ref,
            action=f"give an id: {image} or {volume}",
        )
    return volume is not None


async def _ready_image(context: Context, ref: str) -> Versioned[Image]:
    found = await find(context.store, Image, ref)
    image = found.record
    if image.status.state is not ImageState.READY or image.status.content is None:
        raise WrongStateError(
            f"{image.label} is {image.status.state}, not ready",
            object=image.label,
            action="wait for it: croft task ls",
            state=image.status.state,
        )
    if image.status.content.disk is None:
        raise InvalidError(
            f"{image.label} has no disk, so no volume can begin as it", object=image.label
        )
    return found


def _size(request: VolumeCreate, image: Image | None) -> int:
    content = image.status.content if image is not None else None
    base = content.virtual_size if content is not None else 0
    if request.size is None and base == 0:
        raise InvalidError("how large is the volume to be?", action="give a size: --size 20G")
    size = check_volume_size(request.size if request.size is not None else base)
    if size < base:
        raise InvalidError(
            f"a volume of {format_size(size)} is smaller than the image's {format_size(base)}",
            object=image.label if image else None,
            action="leave the size out, or choose a larger one",
        )
    return size
