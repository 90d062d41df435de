"""Checkpoints of VMs: for backups, Undercroft's own and those of others."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from undercroft.model.checkpoint import (
    Changes,
    Checkpoint,
    CheckpointCreate,
    CheckpointDisk,
    CheckpointState,
)
from undercroft.model.errors import BusyError, InvalidError, NotFoundError, WrongStateError
from undercroft.model.names import new_id
from undercroft.model.snapshot import SnapshotSpec
from undercroft.model.task import Task
from undercroft.model.vm import VM, VMState
from undercroft.operations.access import Caller
from undercroft.operations.asking import Volumes, ask
from undercroft.operations.context import Context, find
from undercroft.store.interface import Listing, Versioned

MAX_OWNER = 128
OURS = "backup/"
PIPE = "backup/-"
"""Owner of checkpoints that are sent away, and go when that is done."""
MAX_CHECKPOINTS = 16  # of one VM: each costs a bit for every 64 KiB that is written
MAX_READ = 32 << 20  # bytes of one request

_Arguments = dict[str, object]


class CheckpointOperations:
    """Every verb on checkpoints."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self, caller: Caller, ref: str) -> Listing[Checkpoint]:
        """The checkpoints of a VM, oldest first."""
        caller.require("vm.view")
        vm = (await find(self._context.store, VM, ref)).record
        listing = await self._context.store.list(Checkpoint)
        items = [item for item in listing.items if item.record.spec.vm == vm.meta.id]
        items.sort(key=lambda item: (item.record.meta.created, item.record.meta.id))
        return Listing(items, listing.revision)

    async def get(self, caller: Caller, ref: str, checkpoint: str) -> Versioned[Checkpoint]:
        """A VM's checkpoint with this id."""
        caller.require("vm.view")
        return await self._find((await find(self._context.store, VM, ref)).record, checkpoint)

    async def create(self, caller: Caller, ref: str, request: CheckpointCreate) -> Task:
        """Keeps what all disks hold at one moment, and marks what changes from then on.

        Raises:
            InvalidError: the request makes no sense. BusyError: there are too many.
            WrongStateError: the VM is being made or removed.
        """
        if request.owner.startswith(OURS):
            raise InvalidError(
                f"owners that begin with {OURS} are Undercroft's own", action="choose another one"
            )
        return await self.make(caller, ref, request)

    async def make(self, caller: Caller, ref: str, request: CheckpointCreate) -> Task:
        """The same, also for backups."""
        caller.require("vm.backup")
        if len(request.owner) > MAX_OWNER or not request.owner.isprintable():
            raise InvalidError(f"an owner has at most {MAX_OWNER} printable characters")

        async def prepare(vm: VM, _: Volumes) -> tuple[VM, _Arguments]:
            return vm, await self.arguments(vm, request)

        return await ask(self._context, caller, ref, "checkpoint.create", prepare)

    async def arguments(self, vm: VM, request: CheckpointCreate) -> _Arguments:
        """What the task of a VM's actor needs to make a checkpoint.

        Raises:
            BusyError: there are too many. WrongStateError: the VM is being made.
        """
        if vm.status.state is VMState.CREATING:
            raise WrongStateError(
                f"{vm.label} is being made", object=vm.label, action="wait until it is there"
            )
        listing = await self._context.store.list(Checkpoint)
        own = [item for item in listing.items if item.record.spec.vm == vm.meta.id]
        if len(own) >= MAX_CHECKPOINTS:
            raise BusyError(
                f"{vm.label} has {len(own)} checkpoints already",
                object=vm.label,
                action="remove those that nobody needs",
            )
        snapshot = new_id("snapshot")
        spec = SnapshotSpec(vm=vm.meta.id, quiesce=request.quiesce, passing=True)
        return {
            "checkpoint": new_id("checkpoint"),
            "owner": request.owner,
            "snapshot": snapshot,
            "name": snapshot,
            "spec": msgspec.to_builtins(spec),
        }

    async def release(
        self, caller: Caller, ref: str, checkpoint: str, *, remove: bool = False
    ) -> Task:
        """Lets the content of a checkpoint go; what changes goes on being marked, unless it is to
        be removed altogether.

        Raises:
            NotFoundError: there is no such checkpoint.
        """
        caller.require("vm.backup")

        async def prepare(vm: VM, _: Volumes) -> tuple[VM, _Arguments]:
            found = (await self._find(vm, checkpoint)).record
            return vm, {"checkpoint": found.meta.id, "remove": remove}

        return await ask(self._context, caller, ref, "checkpoint.release", prepare)

    async def give_up(self, caller: Caller, ref: str, checkpoint: str) -> Task:
        """Removes a checkpoint, also one that is only just being made."""
        caller.require("vm.backup")

        async def prepare(vm: VM, _: Volumes) -> tuple[VM, _Arguments]:
            return vm, {"checkpoint": checkpoint, "remove": True}

        return await ask(self._context, caller, ref, "checkpoint.release", prepare)

    async def changes(
        self, caller: Caller, ref: str, checkpoint: str, disk: int, since: str | None
    ) -> Changes:
        """What of a disk at a checkpoint is not what it was at an earlier one (``since``), or
        without one, all that it holds but zeroes.

        Raises:
            NotFoundError: there is no such checkpoint or disk. WrongStateError: it is not open.
            ConflictError: it cannot be told any more what has changed.
        """
        vm, found, _ = await self._open(caller, ref, checkpoint, disk)
        earlier = (await self._find(vm, since)).record if since is not None else None
        return await self._context.services.changes(vm, found, disk, earlier)

    async def read(
        self, caller: Caller, ref: str, checkpoint: str, disk: int, offset: int, length: int
    ) -> AsyncIterator[bytes]:
        """A part of what a disk held at a checkpoint.

        Raises:
            NotFoundError: there is no such checkpoint or disk. WrongStateError: it is not open.
            InvalidError: the disk has no such part.
        """
        vm, found, what = await self._open(caller, ref, checkpoint, disk)
        if offset < 0 or length < 0 or offset + length > what.size:
            raise InvalidError(
                f"disk {disk} has {what.size} bytes", action="ask for a part of those"
            )
        return self._context.services.read_disk(vm, found, disk, offset, length)

    async def disk(self, caller: Caller, ref: str, checkpoint: str, disk: int) -> CheckpointDisk:
        """A disk of an open checkpoint."""
        return (await self._open(caller, ref, checkpoint, disk))[2]

    async def _open(
        self, caller: Caller, ref: str, checkpoint: str, disk: int
    ) -> tuple[VM, Checkpoint, CheckpointDisk]:
        caller.require("vm.backup")
        vm = (await find(self._context.store, VM, ref)).record
        found = (await self._find(vm, checkpoint)).record
        if found.status.state is not CheckpointState.OPEN:
            raise WrongStateError(
                f"what {found.label} held was let go",
                object=found.label,
                action="make another one: only what changed since this one is known",
                state=found.status.state,
            )
        if not 0 <= disk < len(found.status.disks):
            raise NotFoundError(f"{vm.label} had no disk {disk}", object=found.label)
        return vm, found, found.status.disks[disk]

    async def _find(self, vm: VM, id: str) -> Versioned[Checkpoint]:
        found = await self._context.store.get(Checkpoint, id) if id.isascii() else None
        if found is None or found.record.spec.vm != vm.meta.id:
            raise NotFoundError(
                f"{vm.label} has no checkpoint {id[:80]}", object=f"checkpoint {id[:80]}"
            )
        return found
