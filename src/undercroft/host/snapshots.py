"""How an actor takes a snapshot of its VM, goes back to one, and forgets one.

The order in which things are written makes every step repeatable. A snapshot is taken by giving
each volume a new layer over the one it wrote to: first its file, then the record, then QEMU. So
whatever starts the VM after a crash, it writes to the new layer, and what QEMU may still have
written to the old one before that is beneath it.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

import msgspec
import structlog

from undercroft.host.actor import Outcome, VMActor
from undercroft.host.environment import Environment
from undercroft.host.forgetting import forget
from undercroft.host.imaging import reported
from undercroft.host.layers import (
    get_layer,
    head_layer,
    make_layer,
    new_layer,
    volume_status,
)
from undercroft.host.marks import marks_of
from undercroft.host.outcome import TaskRun, change_status, to_its_end
from undercroft.host.planning import plan_disks
from undercroft.host.quiescing import quiescent, thaw_at_last
from undercroft.host.snapshot_files import copy_state, has_memory, memory_size
from undercroft.hypervisor.machine import QemuMachine, RunState
from undercroft.hypervisor.plan import PlanDisk
from undercroft.model.base import Meta
from undercroft.model.checks import check_can_be_saved
from undercroft.model.errors import (
    AlreadyExistsError,
    DataError,
    QmpError,
    TimeLimitError,
    UndercroftError,
    WrongStateError,
)
from undercroft.model.layer import Layer
from undercroft.model.snapshot import (
    Snapshot,
    SnapshotDisk,
    SnapshotSpec,
    SnapshotState,
    SnapshotStatus,
)
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.context import snapshot_scope
from undercroft.operations.snapshots import already_taken
from undercroft.storage.threads import in_thread
from undercroft.store.interface import Claim, Put, Transaction, update

log = structlog.get_logger(__name__)

END_PATIENCE = 5.0  # seconds for a QEMU whose monitor is gone to end


async def take(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Takes a snapshot. The guest goes on meanwhile."""
    done = await taken(actor, vm, run)

    def change(record: VM) -> VM:
        record = change_status(record, snapshot=done.meta.id)
        if actor.machine is None:  # it is off, or its end is still to be seen to
            return record
        return change_status(record, state=actor.present_state(record))

    return Outcome(
        change,
        event="snapshot.created",
        message=f"snapshot {done.meta.name} of {vm.label} was taken",
        result={"snapshot": done.meta.id},
        extra=lambda record: ([Put(done)], [], []),
    )


async def taken(actor: VMActor, vm: VM, run: TaskRun) -> Snapshot:
    """Takes the snapshot that a task's arguments describe; how it is to be written down. May be
    cut off and repeated, or undone (`undo`).

    Raises:
        UndercroftError, OSError: it did not work.
    """
    environment = actor.environment
    machine = actor.machine
    if machine is not None and run.arguments["spec"].get("memory"):
        check_can_be_saved(vm, "snapshot")
    snapshot = await _begin(actor, vm, run)
    if machine is not None and snapshot.spec.memory and snapshot.status.running:
        await machine.stop_saving()  # which a daemon that died had begun
    if machine is not None and await _missed(environment, vm, snapshot, machine):
        snapshot = await _renewed(environment, snapshot)
    switched = await _switched(environment, snapshot)
    going = machine is not None and snapshot.status.running
    marks = await marks_of(environment, vm.meta.id)
    if "checkpoint" in run.arguments:
        marks.append(str(run.arguments["checkpoint"]))
    quiet = machine if snapshot.spec.quiesce and not switched else None
    stood: float | None = None
    try:
        for disk in snapshot.status.disks:
            if disk.next != disk.layer:
                await make_layer(environment, disk.next, marks=marks)
        if not switched:
            await in_thread(lambda _: copy_state(environment, snapshot))
        if machine is not None and await _to_be_saved_live(environment, snapshot, machine):
            stood = await _save_live(environment, vm, run, snapshot, machine)
        else:
            if machine is not None and snapshot.spec.memory and not switched:
                with contextlib.suppress(WrongStateError):  # it runs, and its memory is saved
                    await machine.make_savable()
            async with quiescent(actor, quiet):
                await to_its_end(_switch_and_branch(actor, vm, snapshot, machine))
            if snapshot.spec.memory and snapshot.status.alive:
                await _save_memory(environment, run, snapshot, machine)
    finally:
        halted = machine is not None and machine.run_state is RunState.PAUSED
        if going and halted and snapshot.spec.memory and machine is not None:
            with contextlib.suppress(QmpError, TimeLimitError):
                await machine.resume()
    memory = await asyncio.to_thread(memory_size, environment.snapshot_directory(snapshot))
    status = msgspec.structs.replace(
        snapshot.status,
        state=SnapshotState.READY,
        memory=memory,
        stood_still=stood,
        quiesced=snapshot.spec.quiesce and machine is not None,
    )
    return msgspec.structs.replace(snapshot, status=status)


async def _switched(environment: Environment, snapshot: Snapshot) -> bool:
    """Whether it is written down that the volumes write to the new layers."""
    moving = [disk for disk in snapshot.status.disks if disk.next != disk.layer]
    heads = [await head_layer(environment, disk.volume) for disk in moving]
    return bool(heads) and heads == [disk.next for disk in moving]


async def _to_be_saved_live(
    environment: Environment, snapshot: Snapshot, machine: QemuMachine
) -> bool:
    """Whether the memory of a guest that runs is still to be saved. What a daemon that died had
    saved goes with what the disks had then, and what is in memory now does not."""
    if not snapshot.spec.memory or machine.run_state is not RunState.RUNNING:
        return False
    return not await has_memory(environment, snapshot)


async def _missed(
    environment: Environment, vm: VM, snapshot: Snapshot, machine: QemuMachine
) -> bool:
    """Whether the guest went on (as the daemon ended) after its disks had branched off, but before
    its memory was saved: then the one does not go with the other any more."""
    if not snapshot.spec.memory or machine.run_state is RunState.PAUSED:
        return False
    if await has_memory(environment, snapshot) or not await _switched(environment, snapshot):
        return False
    return await machine.branched(await plan_disks(environment, vm))


async def _renewed(environment: Environment, snapshot: Snapshot) -> Snapshot:
    """The snapshot with one layer more for each disk, to branch off once more."""
    disks: list[SnapshotDisk] = []
    layers: list[Layer] = []
    for disk in snapshot.status.disks:
        if disk.next == disk.layer:
            disks.append(disk)
            continue
        below = await get_layer(environment, disk.next)
        layers.append(new_layer(environment, below.spec.size, parent=below))
        disks.append(SnapshotDisk(volume=disk.volume, layer=disk.next, next=layers[-1].meta.id))
    status = msgspec.structs.replace(snapshot.status, disks=tuple(disks))
    snapshot = msgspec.structs.replace(snapshot, status=status)
    await environment.store.transact(
        Transaction(puts=[Put(snapshot), *(Put(layer) for layer in layers)])
    )
    return snapshot


async def _begin(actor: VMActor, vm: VM, run: TaskRun) -> Snapshot:
    """Writes down what is about to be taken, and the layers that it takes.

    Raises:
        AlreadyExistsError: there is one of that name.
    """
    environment = actor.environment
    id = str(run.arguments["snapshot"])
    found = await environment.store.get(Snapshot, id)
    if found is not None:
        return found.record
    spec = msgspec.convert(run.arguments["spec"], SnapshotSpec)
    only = run.arguments.get("volume")  # of all disks, the one that is to branch off
    disks: list[SnapshotDisk] = []
    layers: list[Layer] = []
    for disk in vm.spec.disks:
        head = await get_layer(environment, await head_layer(environment, disk.volume))
        following = head.meta.id
        if not disk.read_only and only in (None, disk.volume):
            layers.append(new_layer(environment, head.spec.size, parent=head))
            following = layers[-1].meta.id
        disks.append(SnapshotDisk(volume=disk.volume, layer=head.meta.id, next=following))
    machine = actor.machine
    snapshot = Snapshot(
        meta=Meta(id=id, name=str(run.arguments["name"]), created=environment.clock()),
        spec=spec,
        status=SnapshotStatus(
            parent=vm.status.snapshot,
            disks=tuple(disks),
            shape=vm.spec,
            alive=machine is not None,
            running=machine is not None and machine.run_state is RunState.RUNNING,
        ),
    )
    name = Claim(snapshot_scope(vm.meta.id), snapshot.meta.name, id)
    try:
        await environment.store.transact(
            Transaction(
                claims=[] if spec.passing else [name],
                puts=[Put(snapshot), *(Put(layer) for layer in layers)],
            )
        )
    except AlreadyExistsError:
        raise already_taken(vm, snapshot.meta.name) from None
    return snapshot


async def _save_memory(
    environment: Environment, run: TaskRun, snapshot: Snapshot, machine: QemuMachine | None
) -> None:
    """Saves the memory of a guest that stood still already, or that a daemon that died had stopped
    for it.

    Raises:
        UndercroftError: it could not be saved, or is gone.
    """
    path = environment.snapshot_directory(snapshot) / "memory"
    if path.exists():  # by a daemon that died after that
        return
    if machine is None:
        raise QmpError("the VM ended before its memory was saved", object=snapshot.label)
    async with reported(run) as report:
        await machine.save_memory(path, lambda fraction: report(fraction, "saving the memory"))


async def _save_live(
    environment: Environment, vm: VM, run: TaskRun, snapshot: Snapshot, machine: QemuMachine
) -> float:
    """Saves the memory of a guest that goes on, and has its disks branch off just then. For how
    many seconds it stood still.

    Raises:
        UndercroftError, OSError: it did not work.
    """
    path = environment.snapshot_directory(snapshot) / "memory"
    await to_its_end(_switch(environment, snapshot, forward=True))
    disks = await plan_disks(environment, vm)
    try:
        async with reported(run) as report:
            return await machine.save_live(
                path, disks, lambda fraction: report(fraction, "saving the memory")
            )
    except BaseException:
        await to_its_end(_switch_back(environment, snapshot, machine, disks))
        raise


async def _switch_back(
    environment: Environment,
    snapshot: Snapshot,
    machine: QemuMachine,
    disks: tuple[PlanDisk, ...],
) -> None:
    with contextlib.suppress(QmpError, TimeLimitError):  # if QEMU is gone, either is right
        if not await machine.branched(disks):
            await _switch(environment, snapshot, forward=False)


async def _switch_and_branch(
    actor: VMActor, vm: VM, snapshot: Snapshot, machine: QemuMachine | None
) -> None:
    await _switch(actor.environment, snapshot, forward=True)
    if machine is not None:
        await _branch(actor, vm, snapshot, machine)


async def _switch(environment: Environment, snapshot: Snapshot, *, forward: bool) -> None:
    """Writes which layers the volumes write to: the new ones, or (back again) the old ones."""
    for disk in snapshot.status.disks:
        change = partial(volume_status, head=disk.next if forward else disk.layer)
        await update(environment.store, Volume, disk.volume, change)


async def _branch(actor: VMActor, vm: VM, snapshot: Snapshot, machine: QemuMachine) -> None:
    """Has QEMU write to the new layers. If it dies over that, the VM goes on with them at its next
    start.

    Raises:
        UndercroftError: QEMU refuses, and all is as it was; or it runs and does not tell, then the
            VM's next start is with the new ones, which is right in either case.
    """
    environment = actor.environment
    disks = await plan_disks(environment, vm)
    try:
        await machine.branch(disks)
    except (UndercroftError, OSError) as error:
        try:
            if await machine.branched(disks):
                return
        except (QmpError, TimeLimitError):
            if await actor.exited(END_PATIENCE) is not None:
                return
            raise
        await _switch(environment, snapshot, forward=False)
        if isinstance(error, OSError):
            raise DataError(f"{error.filename}: {error.strerror}", object=vm.label) from error
        raise


async def undo(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Undoes what a task that failed or was cancelled has done of a snapshot; the VM goes on as it
    was, with its disks as they are."""
    found = await actor.environment.store.get(Snapshot, str(run.arguments.get("snapshot")))
    if found is not None and found.record.status.state is SnapshotState.PENDING:
        snapshot, machine = found.record, actor.machine
        if machine is not None:
            if snapshot.spec.quiesce:
                thaw_at_last(actor, machine)
            if snapshot.spec.memory and snapshot.status.running:
                with contextlib.suppress(QmpError, TimeLimitError, WrongStateError):
                    await machine.stop_saving()
                    await machine.resume()
        await forget(actor.environment, snapshot)
    return Outcome(lambda record: record)
