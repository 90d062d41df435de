"""Asking something of a VM's actor: what is wanted of the VM, and the task that brings it about."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from undercroft.model.errors import StaleError
from undercroft.model.task import Task
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.access import Caller
from undercroft.operations.context import ATTEMPTS, Context, check_queue, find, new_task
from undercroft.operations.vm_power import check_present
from undercroft.store.interface import Check, Put, Transaction, Versioned

Volumes = list[Versioned[Volume]]
Prepare = Callable[[VM, Volumes], Awaitable[tuple[VM, dict[str, object]]]]
Beside = Callable[[VM, Task], Task]


async def ask(
    context: Context,
    caller: Caller,
    ref: str,
    verb: str,
    prepare: Prepare,
    beside: Beside | None = None,
) -> Task:
    """Writes what is wanted of a VM, and the task that brings it about. ``prepare`` gives the VM as
    it is to be, and the task's arguments, and may add volumes as they are to be to its second
    argument; ``beside`` another task that goes with it, and that is
    returned instead.

    Raises:
        NotFoundError: there is no such VM. WrongStateError: it is being removed.
    """
    for _ in range(ATTEMPTS):
        found = await find(context.store, VM, ref)
        vm = found.record
        check_present(vm)
        check_queue(vm)
        volumes: Volumes = []
        wanted, arguments = await prepare(vm, volumes)
        task = new_task(context, verb, vm, caller.name, **arguments)
        wanted = msgspec.structs.replace(wanted, tasks=(*vm.tasks, task.meta.id))
        other = beside(vm, task) if beside is not None else None
        try:
            await context.store.transact(
                Transaction(
                    checks=[
                        Check(VM, vm.meta.id, found.revision),
                        *(Check(Volume, v.record.meta.id, v.revision) for v in volumes),
                    ],
                    puts=[
                        Put(wanted),
                        Put(task),
                        *([Put(other)] if other is not None else []),
                        *(Put(volume.record) for volume in volumes),
                    ],
                )
            )
        except StaleError:
            continue
        return other or task
    raise StaleError(f"others keep changing vm {ref}", object=f"vm {ref}", action="try again")
