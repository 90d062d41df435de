"""How a snapshot is forgotten: one that somebody has no use for, or that was never finished."""

from __future__ import annotations

import msgspec
import structlog

from undercroft.host.actor import Outcome, VMActor
from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.host.folding import finish_folds, fold_layers
from undercroft.host.layers import collect_layers
from undercroft.host.merging import merge_layers
from undercroft.host.outcome import TaskRun, change_status, unless_hurried, write
from undercroft.host.snapshot_files import remove_strays
from undercroft.model.errors import UndercroftError
from undercroft.model.snapshot import Snapshot, SnapshotState
from undercroft.model.task import Task
from undercroft.model.vm import VM
from undercroft.operations.context import snapshot_scope
from undercroft.storage.threads import in_thread
from undercroft.store.interface import Delete, Put, Release, Transaction

log = structlog.get_logger(__name__)


async def remove(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Forgets a snapshot. Others that came from it, and the VM, stay as they are."""
    environment = actor.environment
    await run.commit()
    id, name = str(run.arguments["snapshot"]), str(run.arguments["name"])
    found = await environment.store.get(Snapshot, id)
    if found is not None:  # else a daemon died after that
        snapshot = found.record
        parent = snapshot.status.parent
        await write(environment, VM, vm.meta.id, lambda v: _from(v, id, parent))
        children = [
            item.record
            for item in (await environment.store.list(Snapshot)).items
            if item.record.status.parent == id
        ]
        await in_thread(lambda _: remove_tree(environment.snapshot_directory(snapshot)))
        await environment.store.transact(
            Transaction(
                puts=[Put(_child_of(child, parent)) for child in children],
                deletes=[Delete(Snapshot, id)],
                releases=[Release(snapshot_scope(vm.meta.id), name, id)],
            )
        )
    await collect_layers(environment)
    try:
        await finish_folds(actor, vm, run)
        await unless_hurried(run, _put_together(actor, vm, run))
        if run.hurry.is_set() and actor.machine is not None:
            await actor.machine.give_up_merging()  # an earlier daemon may have begun something
    except (UndercroftError, OSError) as error:  # the snapshot is gone all the same
        log.warning("layers were not merged", vm=vm.meta.name, error=str(error))
    await collect_layers(environment)  # also what an earlier daemon had put together
    return Outcome(
        lambda record: record,
        event="snapshot.removed",
        message=f"snapshot {name} of {vm.label} was removed",
    )


async def _put_together(actor: VMActor, vm: VM, run: TaskRun) -> None:
    await fold_layers(actor, vm, run, cheaper=True)
    await merge_layers(actor, vm, run)


def _from(vm: VM, old: str, new: str | None) -> VM:
    return change_status(vm, snapshot=new) if vm.status.snapshot == old else vm


def _child_of(snapshot: Snapshot, parent: str | None) -> Snapshot:
    status = msgspec.structs.replace(snapshot.status, parent=parent)
    return msgspec.structs.replace(snapshot, status=status)


async def forget(environment: Environment, snapshot: Snapshot) -> None:
    """Removes a snapshot that was not finished, or was only passing."""
    name = Release(snapshot_scope(snapshot.spec.vm), snapshot.meta.name, snapshot.meta.id)
    await environment.store.transact(
        Transaction(
            deletes=[Delete(Snapshot, snapshot.meta.id)],
            releases=[] if snapshot.spec.passing else [name],
        )
    )
    await in_thread(lambda _: remove_tree(environment.snapshot_directory(snapshot)))
    await collect_layers(environment)


async def collect_snapshots(environment: Environment) -> None:
    """Removes snapshots that nobody will finish: those whose task is over all the same."""
    # In this order: a task is there before the snapshot that it takes.
    snapshots = [item.record for item in (await environment.store.list(Snapshot)).items]
    pending = [one for one in snapshots if one.status.state is SnapshotState.PENDING]
    if not pending:
        return
    wanted = {
        str(item.record.spec.arguments.get("snapshot"))
        for item in (await environment.store.list(Task)).items
        if not item.record.status.state.final
    }
    for snapshot in pending:
        if snapshot.meta.id not in wanted:
            await forget(environment, snapshot)


async def sweep_snapshots(environment: Environment) -> None:
    """Removes what a crash left of snapshots. For the agent, at its start."""
    await collect_snapshots(environment)
    known = {item.record.meta.id for item in (await environment.store.list(Snapshot)).items}
    await in_thread(lambda _: remove_strays(environment.data / "vms", known))
