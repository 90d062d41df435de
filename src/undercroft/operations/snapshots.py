"""Snapshots of VMs: taking, looking at, going back to and forgetting them."""

from __future__ import annotations

import msgspec

from undercroft.model.checks import check_can_be_saved, check_moment
from undercroft.model.errors import (
    AlreadyExistsError,
    InvalidError,
    NotFoundError,
    WrongStateError,
)
from undercroft.model.names import check_name, is_id, new_id
from undercroft.model.requests import RevertRequest, SnapshotCreate
from undercroft.model.snapshot import Snapshot, SnapshotSpec, SnapshotState
from undercroft.model.task import Task
from undercroft.model.vm import VM, Power, VMSpec
from undercroft.operations.access import Caller
from undercroft.operations.asking import Volumes, ask
from undercroft.operations.context import (
    Context,
    find,
    snapshot_scope,
)
from undercroft.operations.snapshot_disks import lost_volumes
from undercroft.operations.volume_use import check_settled
from undercroft.store.interface import Listing, Versioned

MAX_DESCRIPTION = 1024
# What a VM goes back to besides its disks. Its name, networks and policies stay what they are now.
SHAPE = (
    "cpus",
    "memory",
    "machine",
    "firmware",
    "secure_boot",
    "tpm",
    "cpu_model",
    "display",
    "cdroms",
    "boot",
    "kernel_arguments",
)


def already_taken(vm: VM, name: str) -> AlreadyExistsError:
    """The error for a second snapshot of a name."""
    return AlreadyExistsError(
        f"{vm.label} has a snapshot {name} already",
        object=f"snapshot {name}",
        action=f"choose another name, or remove that one: croft snapshot rm {vm.meta.name} {name}",
    )


class SnapshotOperations:
    """Every verb on snapshots."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self, caller: Caller, ref: str) -> Listing[Snapshot]:
        """The snapshots of a VM, oldest first."""
        caller.require("vm.view")
        vm = (await find(self._context.store, VM, ref)).record
        listing = await self._context.store.list(Snapshot)
        items = [
            item
            for item in listing.items
            if item.record.spec.vm == vm.meta.id and not item.record.spec.passing
        ]
        items.sort(key=lambda item: (item.record.meta.created, item.record.meta.id))
        return Listing(items, listing.revision)

    async def get(self, caller: Caller, ref: str, snapshot: str) -> Versioned[Snapshot]:
        """A VM's snapshot with this name or id."""
        caller.require("vm.view")
        vm = (await find(self._context.store, VM, ref)).record
        return await self._find(vm, snapshot)

    async def create(self, caller: Caller, ref: str, request: SnapshotCreate) -> Task:
        """Takes a snapshot.

        Raises:
            InvalidError: the request makes no sense. AlreadyExistsError: the name is taken.
            WrongStateError: the VM is being made or removed.
        """
        caller.require("vm.snapshot")
        if len(request.description) > MAX_DESCRIPTION:
            raise InvalidError(f"a description has at most {MAX_DESCRIPTION} characters")
        if request.name is not None:
            check_name(request.name, "snapshot")
        check_moment(request.memory, request.quiesce)

        async def prepare(vm: VM, volumes: Volumes) -> tuple[VM, dict[str, object]]:
            if request.memory and vm.status.state.alive:
                check_can_be_saved(vm, "snapshot")
            name = request.name or await self._free_name(vm)
            if await self._context.store.resolve(snapshot_scope(vm.meta.id), name) is not None:
                raise already_taken(vm, name)
            spec = SnapshotSpec(
                vm=vm.meta.id,
                description=request.description,
                memory=request.memory,
                quiesce=request.quiesce,
            )
            arguments: dict[str, object] = {
                "snapshot": new_id("snapshot"),
                "name": name,
                "spec": msgspec.to_builtins(spec),
            }
            return vm, arguments

        return await ask(self._context, caller, ref, "snapshot.create", prepare)

    async def revert(self, caller: Caller, ref: str, snapshot: str, request: RevertRequest) -> Task:
        """Makes a VM what it was when the snapshot was taken, switched on if it has memory.

        Raises:
            NotFoundError: there is no such snapshot. WrongStateError: it runs, and ``force`` was
            not given; or the snapshot is not ready.
        """
        caller.require("vm.snapshot")

        async def prepare(vm: VM, volumes: Volumes) -> tuple[VM, dict[str, object]]:
            found = await self._ready(vm, snapshot)
            if vm.status.state.alive and not request.force:
                raise WrongStateError(
                    f"{vm.label} is {vm.status.state}: going back would switch it off",
                    object=vm.label,
                    action="stop it first, or let it be switched off with --force",
                    state=vm.status.state,
                )
            await check_settled(self._context, vm)
            goes_on = request.start or (found.status.memory > 0 and found.status.running)
            volumes += await lost_volumes(self._context, vm, found)
            wanted = msgspec.structs.replace(
                vm,
                spec=msgspec.structs.replace(
                    vm.spec, power=Power.RUNNING if goes_on else Power.STOPPED
                ),
            )
            return wanted, {
                "snapshot": found.meta.id,
                "name": found.meta.name,
                "volumes": [volume.record.meta.id for volume in volumes],
            }

        return await ask(self._context, caller, ref, "snapshot.revert", prepare)

    async def remove(self, caller: Caller, ref: str, snapshot: str) -> Task:
        """Forgets a snapshot; the VM, and snapshots that came from it, stay as they are.

        Raises:
            NotFoundError: there is no such snapshot. WrongStateError: it is just being taken.
        """
        caller.require("vm.snapshot")

        async def prepare(vm: VM, volumes: Volumes) -> tuple[VM, dict[str, object]]:
            found = await self._ready(vm, snapshot)
            return vm, {"snapshot": found.meta.id, "name": found.meta.name}

        return await ask(self._context, caller, ref, "snapshot.remove", prepare)

    async def _ready(self, vm: VM, ref: str) -> Snapshot:
        snapshot = (await self._find(vm, ref)).record
        if snapshot.status.state is not SnapshotState.READY:
            raise WrongStateError(
                f"{snapshot.label} is just being taken",
                object=snapshot.label,
                action="wait for it: croft task ls",
                state=snapshot.status.state,
            )
        return snapshot

    async def _find(self, vm: VM, ref: str) -> Versioned[Snapshot]:
        store = self._context.store
        id: str | None = ref
        if not is_id(ref):
            scope = snapshot_scope(vm.meta.id)
            id = await store.resolve(scope, ref) if ref.isascii() else None
        found = await store.get(Snapshot, id) if id is not None else None
        if found is None or found.record.spec.vm != vm.meta.id or found.record.spec.passing:
            raise NotFoundError(
                f"{vm.label} has no snapshot {ref[:80]}",
                object=f"snapshot {ref[:80]}",
                action=f"see what exists with: croft snapshot ls {vm.meta.name}",
            )
        return found

    async def _free_name(self, vm: VM) -> str:
        """The next of snap1, snap2, …"""
        number = 1
        scope = snapshot_scope(vm.meta.id)
        while await self._context.store.resolve(scope, f"snap{number}") is not None:
            number += 1
        return f"snap{number}"


def shape(spec: VMSpec | None) -> dict[str, object]:
    """What of its shape a VM takes on that goes back to a snapshot with this one."""
    return {} if spec is None else {name: getattr(spec, name) for name in SHAPE}
