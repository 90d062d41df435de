"""Tasks: looking, waiting, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import aclosing

import msgspec

from undercroft.model.errors import CompactedError, StaleError
from undercroft.model.task import Task
from undercroft.operations.access import Caller
from undercroft.operations.context import ATTEMPTS, Context, find
from undercroft.operations.held import POOL
from undercroft.store.interface import Check, Listing, Put, Transaction, Versioned


class TaskOperations:
    """Every verb on tasks."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def get(self, caller: Caller, id: str) -> Versioned[Task]:
        """The task with this id."""
        caller.require("task.view")
        return await find(self._context.store, Task, id)

    async def list(self, caller: Caller) -> Listing[Task]:
        """All tasks that are still remembered, but those of the pool of VMs held ready."""
        caller.require("task.view")
        listing = await self._context.store.list(Task)
        items = [item for item in listing.items if item.record.spec.by != POOL.name]
        return Listing(items, listing.revision)

    async def wait(self, caller: Caller, id: str, timeout: float) -> Versioned[Task]:
        """The task once it is final, or as it is after ``timeout`` seconds."""
        found = await self.get(caller, id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not found.record.status.state.final:
                    # Not from the task's own revision: history that far back may be gone.
                    revision = await self._context.store.revision()
                    found = await self.get(caller, id)
                    if not found.record.status.state.final:
                        await self._change(id, revision)
        return found

    async def _change(self, id: str, revision: int) -> None:
        """Waits until the task is written after this revision."""
        with contextlib.suppress(CompactedError):
            async with aclosing(self._context.store.watch([Task], revision)) as changes:
                async for batch in changes:
                    if any(change.id == id for change in batch.changes):
                        return

    async def cancel(self, caller: Caller, id: str) -> Versioned[Task]:
        """Asks the task to stop; what cannot be undone any more is finished instead. A task that is
        final already stays as it is."""
        caller.require("task.cancel")
        for _ in range(ATTEMPTS):
            found = await find(self._context.store, Task, id)
            task = found.record
            if task.status.state.final or task.spec.cancel:
                return found
            wanted = msgspec.structs.replace(
                task, spec=msgspec.structs.replace(task.spec, cancel=True)
            )
            try:
                revision = await self._context.store.transact(
                    Transaction(checks=[Check(Task, id, found.revision)], puts=[Put(wanted)])
                )
            except StaleError:
                continue
            return Versioned(wanted, revision)
        raise StaleError(f"task {id} keeps changing", object=f"task {id}", action="try again")
