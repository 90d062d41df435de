"""Makes and removes volumes that belong to no VM: a worker per volume that has work."""

from __future__ import annotations

import asyncio

import msgspec

from undercroft.host.attachments import grow
from undercroft.host.datastores import layer_file
from undercroft.host.imaging import reported
from undercroft.host.layers import (
    collect_layers,
    get_layer,
    head_layer,
    make_layer,
    volume_status,
)
from undercroft.host.outcome import TaskRun, finish
from undercroft.host.volume_clone import abandon, branch_off, flatten
from undercroft.host.worker import Worker
from undercroft.model.errors import UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.units import format_size
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.context import scope
from undercroft.storage.files import allocated
from undercroft.store.interface import Delete, Put, Release, update

_INFO = EventLevel.INFO


class VolumeWorker(Worker[Volume]):
    """Carries out the tasks of one volume, one at a time."""

    kind = Volume

    async def carry_out(self, record: Volume, run: TaskRun) -> None:
        """Makes, clones, flattens, grows or removes the volume."""
        match run.task.spec.verb:
            case "volume.remove":
                self.commit()
                await self._gone(record, run, None, "volume.removed", f"{record.label} was removed")
            case "volume.clone":
                await self._clone(record, run)
            case "volume.flatten":
                await self._flatten(record, run)
            case "volume.resize":
                await self._resize(record, run)
            case _:
                await self._create(record, run)

    def may_begin(self, record: Volume) -> bool:
        """A clone waits until it has branched off, which is done for its source."""
        waits = record.status.state is VolumeState.PENDING and record.spec.source is not None
        return bool(record.tasks) and not waits

    async def _clone(self, source: Volume, run: TaskRun) -> None:
        self.commit()
        clone = str(run.arguments["clone"])
        made = await branch_off(self.environment, source, clone)
        await finish(
            self.environment,
            Volume,
            self.id,
            run.id,
            change=lambda v: v,
            extra=lambda v: ([Put(made)], [], []),
            result={"volume": clone},
            event=("volume.cloned", f"{made.label} was cloned from {source.label}", _INFO),
        )

    async def _flatten(self, volume: Volume, run: TaskRun) -> None:
        made = await flatten(self.environment, volume, run)
        self.commit()
        await finish(
            self.environment,
            Volume,
            self.id,
            run.id,
            change=lambda v: msgspec.structs.replace(v, spec=made.spec, status=made.status),
            result={"volume": self.id},
            event=("volume.flattened", f"{volume.label} needs nothing of others", _INFO),
        )

    async def _create(self, volume: Volume, run: TaskRun) -> None:
        environment = self.environment
        head = await head_layer(environment, volume.meta.id)
        async with reported(run) as report:
            await make_layer(
                environment, head, progress=lambda done: report(done, "making the disk")
            )
        self.commit()
        path = await layer_file(environment, await get_layer(environment, head))
        taken = await asyncio.to_thread(allocated, path)
        await finish(
            environment,
            Volume,
            self.id,
            run.id,
            change=lambda v: volume_status(v, state=VolumeState.READY, allocated=taken),
            result={"volume": self.id},
            event=("volume.ready", f"{volume.label} is ready", EventLevel.INFO),
        )

    async def _resize(self, volume: Volume, run: TaskRun) -> None:
        self.commit()
        size = int(run.arguments["size"])
        await grow(self.environment, volume, size, file=True)
        await finish(
            self.environment,
            Volume,
            self.id,
            run.id,
            change=lambda v: v,
            result={"volume": self.id, "size": size},
            event=(
                "volume.resized",
                f"{volume.label} has {format_size(size)} now",
                EventLevel.INFO,
            ),
        )

    async def ended(self, record: Volume, run: TaskRun, error: UndercroftError | None) -> None:
        """A volume that could not be made leaves nothing behind but its task and an event; one
        that something else failed for is as it was."""
        told = "was cancelled" if error is None else f"failed: {error.message}"
        verb = run.task.spec.verb
        if verb == "volume.create":
            message = f"making {record.label} {told}"
            await self._gone(record, run, error, "volume.failed", message, error is None)
            return
        if verb == "volume.clone":
            await abandon(self.environment, str(run.arguments["clone"]))
        await finish(
            self.environment,
            Volume,
            self.id,
            run.id,
            change=_ready_again,
            error=error,
            cancelled=error is None,
            event=(
                f"{verb}.failed" if error else f"{verb}.cancelled",
                f"{verb.removeprefix('volume.')} of {record.label} {told}",
                EventLevel.ERROR if error else EventLevel.INFO,
            ),
        )

    async def _gone(
        self,
        volume: Volume,
        run: TaskRun,
        error: UndercroftError | None,
        event: str,
        message: str,
        cancelled: bool = False,
    ) -> None:
        """Removes what there is of it, then its record."""
        environment = self.environment
        self.commit()
        await update(environment.store, Volume, self.id, lambda v: volume_status(v, head=""))
        await collect_layers(environment)

        def extra(record: Volume) -> tuple[list[Put], list[Delete], list[Release]]:
            return [], [], [Release(scope("volume"), record.meta.name, record.meta.id)]

        await finish(
            environment,
            Volume,
            self.id,
            run.id,
            change=lambda record: None,
            extra=extra,
            error=error,
            cancelled=cancelled,
            event=(event, message, EventLevel.ERROR if error else EventLevel.INFO),
        )


def _ready_again(volume: Volume) -> Volume:
    if volume.status.state is VolumeState.REMOVING and volume.status.head:
        return volume_status(volume, state=VolumeState.READY)
    return volume
