"""The disks that a VM goes back to with a snapshot."""

from __future__ import annotations

import msgspec

from undercroft.model.errors import WrongStateError
from undercroft.model.snapshot import Snapshot
from undercroft.model.vm import VM, Disk
from undercroft.model.volume import Volume
from undercroft.operations.context import Context
from undercroft.store.interface import Versioned


async def disks_then(
    context: Context, vm: VM, snapshot: Snapshot, volumes: list[Versioned[Volume]]
) -> tuple[Disk, ...]:
    """The disks of a VM when a snapshot was taken. To ``volumes`` is added what becomes of those
    that it has lost or gained since: they are attached again, or from now on stand for themselves.

    Raises:
        WrongStateError: a volume that the snapshot needs is gone, or another VM has it.
    """
    shape = snapshot.status.shape
    if shape is None:
        return vm.spec.disks
    now = {disk.volume for disk in vm.spec.disks}
    then = {disk.volume for disk in shape.disks}
    for id in sorted(then - now):
        found = await context.store.get(Volume, id)
        if found is None or found.record.spec.user not in (None, vm.meta.id):
            gone = found is None
            what = f"volume {id}" if found is None else found.record.label
            raise WrongStateError(
                f"{snapshot.label} needs {what}, which "
                + ("is gone" if gone else "another VM has now"),
                object=snapshot.label,
                action=None if gone else f"detach it there first: croft volume detach {id}",
            )
        volumes.append(_used_by(found, vm.meta.id))
    for id in sorted(now - then):
        found = await context.store.get(Volume, id)
        if found is not None:
            volumes.append(_used_by(found, None))
    return shape.disks


def _used_by(found: Versioned[Volume], vm: str | None) -> Versioned[Volume]:
    spec = msgspec.structs.replace(found.record.spec, vm=None, attached=vm)
    return Versioned(msgspec.structs.replace(found.record, spec=spec), found.revision)
