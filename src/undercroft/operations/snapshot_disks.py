"""The disks that a VM goes back to with a snapshot."""

from __future__ import annotations

import msgspec

from undercroft.model.errors import WrongStateError
from undercroft.model.snapshot import Snapshot
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.context import Context
from undercroft.store.interface import Versioned


async def lost_volumes(context: Context, vm: VM, snapshot: Snapshot) -> list[Versioned[Volume]]:
    """The volumes that a VM has lost since a snapshot was taken, as they are to be written down so
    that nobody else takes them before it is back there.

    Raises:
        WrongStateError: a volume that the snapshot needs is gone, or another VM has it.
    """
    shape = snapshot.status.shape
    if shape is None:
        return []
    lost: list[Versioned[Volume]] = []
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
        spec = msgspec.structs.replace(found.record.spec, vm=None, attached=vm.meta.id)
        record = msgspec.structs.replace(found.record, spec=spec)
        lost.append(Versioned(record, found.revision))
    return lost
