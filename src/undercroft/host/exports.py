"""Makes exports, one worker per export; removes those that nobody fetched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from undercroft.host.environment import Environment
from undercroft.host.exporting import make_export
from undercroft.host.files import remove_tree
from undercroft.host.outcome import TaskRun, finish
from undercroft.host.templates import collect_templates
from undercroft.host.worker import Worker
from undercroft.model.errors import DataError, UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.export import Export, ExportState, ExportStatus
from undercroft.storage.threads import in_thread
from undercroft.store.interface import Delete, Transaction

_PIECE = 1 << 20


class ExportWorker(Worker[Export]):
    """Carries out the task of one export."""

    kind = Export

    async def carry_out(self, record: Export, run: TaskRun) -> None:
        """Writes its files."""
        made = await make_export(self.environment, record, run)
        self.commit()
        status = ExportStatus(
            state=ExportState.READY,
            files=made.files,
            finished=self.environment.clock(),
            notes=made.notes,
        )
        await finish(
            self.environment,
            Export,
            self.id,
            run.id,
            change=lambda export: msgspec.structs.replace(export, status=status),
            result={"export": self.id},
            event=("export.ready", f"{record.spec.source} was exported", EventLevel.INFO),
        )
        await collect_templates(self.environment)

    async def ended(self, record: Export, run: TaskRun, error: UndercroftError | None) -> None:
        """An export that could not be made leaves nothing behind but its task and an event."""
        self.commit()
        told = "was cancelled" if error is None else f"failed: {error.message}"
        await remove_files(self.environment, self.id)
        await finish(
            self.environment,
            Export,
            self.id,
            run.id,
            change=lambda export: None,
            error=error,
            cancelled=error is None,
            event=(
                "export.failed",
                f"exporting {record.spec.source} {told}",
                EventLevel.INFO if error is None else EventLevel.ERROR,
            ),
        )
        await collect_templates(self.environment)


async def remove_files(environment: Environment, id: str) -> None:
    """Removes what belonged to an export."""
    path = environment.directory.export(id)
    await in_thread(lambda _: remove_tree(path))


async def sweep_exports(environment: Environment, before: float = 0.0) -> None:
    """Removes files that belong to no export, and exports that were finished ``before`` (seconds
    since 1970) and that nobody has fetched and removed."""
    known = set()
    for item in (await environment.store.list(Export)).items:
        export = item.record
        finished = export.status.finished
        if finished is not None and finished < before:
            delete = Delete(Export, export.meta.id)
            await environment.store.transact(Transaction(deletes=[delete]))
        else:
            known.add(export.meta.id)
    for path in await asyncio.to_thread(lambda: list(environment.directory.exports.iterdir())):
        if path.name not in known:
            await in_thread(lambda _, path=path: remove_tree(path))  # type: ignore[misc]


async def read_export(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    """The bytes of a file from ``start`` up to ``end``.

    Raises:
        DataError: it is gone.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", object=str(path)) from error
    try:
        while start < end:
            data = await asyncio.to_thread(os.pread, fd, min(_PIECE, end - start), start)
            if not data:
                raise DataError(f"{path} is shorter than it was", object=str(path))
            yield data
            start += len(data)
    finally:
        os.close(fd)
