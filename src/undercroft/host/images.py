"""Makes and removes images: one worker per image that has something to do."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import msgspec
import structlog

from undercroft.host.environment import Environment
from undercroft.host.imaging import MadeImage, make_image, remove_image
from undercroft.host.outcome import TaskRun, finish, unexpected
from undercroft.model.errors import CancelledTaskError, InUseError, UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.image import Image, ImageState, ImageStatus
from undercroft.model.task import Task
from undercroft.model.vm import VM
from undercroft.operations.context import scope
from undercroft.store.interface import Delete, Put, Release

log = structlog.get_logger(__name__)


RETRY_INTERVAL = 5.0  # seconds after a fault of our own before the same is tried again


@dataclass
class _Under:
    task_id: str
    work: asyncio.Task[None]
    committed: bool = False  # its outcome is being written: too late to cancel


class ImageWorker:
    """Carries out the tasks of one image, one at a time."""

    def __init__(self, environment: Environment, id: str) -> None:
        self.environment = environment
        self.id = id
        self._under: _Under | None = None
        self._following: asyncio.Task[None] | None = None
        self._cancelled: set[str] = set()

    def wake(self, image: Image) -> None:
        """The image's record changed: begins its next task if none is under way."""
        if self._under is None and image.tasks and not self.environment.closing:
            task_id = image.tasks[0]
            work = asyncio.create_task(self._do(task_id), name=f"image {self.id}")
            self._under = _Under(task_id, work)
            work.add_done_callback(self._done)

    def cancel_task(self, task_id: str) -> None:
        """Stops a task: at once if it runs, else when its turn comes."""
        if task_id in self._cancelled:
            return  # a second time would cut short how it puts things back
        self._cancelled.add(task_id)
        under = self._under
        if under is not None and under.task_id == task_id and not under.committed:
            under.work.cancel()

    async def close(self) -> None:
        """Stops; what was under way is begun anew by the next daemon."""
        following = self._following
        for work in (following, self._under.work if self._under is not None else None):
            if work is not None:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await work

    def _done(self, work: asyncio.Task[None]) -> None:
        self._under = None
        error = None if work.cancelled() else work.exception()
        if error is not None:
            log.error("image work failed", image=self.id, exc_info=error)
        if not self.environment.closing:
            pause = RETRY_INTERVAL if error is not None else 0.0
            self._following = asyncio.create_task(self._next(pause), name=f"next {self.id}")

    async def _next(self, pause: float) -> None:
        await asyncio.sleep(pause)
        found = await self.environment.store.get(Image, self.id)
        if found is not None:
            self._cancelled &= set(found.record.tasks)
            self.wake(found.record)

    async def _do(self, task_id: str) -> None:
        found = await self.environment.store.get(Image, self.id)
        entry = await self.environment.store.get(Task, task_id)
        if found is None:
            return
        image = found.record
        if entry is None or entry.record.status.state.final:
            await finish(self.environment, Image, self.id, task_id, change=lambda i: i)
            return
        run = TaskRun(self.environment, entry.record)
        try:
            if entry.record.spec.cancel or task_id in self._cancelled:
                raise CancelledTaskError("the task was cancelled")
            await run.begin()
            if entry.record.spec.verb == "image.remove":
                await self._remove(image, run)
            else:
                await self._create(image, run)
        except (asyncio.CancelledError, CancelledTaskError):
            asked = task_id in self._cancelled or entry.record.spec.cancel
            if not asked or (self._under is not None and self._under.committed):
                raise  # the daemon is closing
            await self._ended(image, run, None)
        except UndercroftError as error:
            log.warning("task failed", task=task_id, image=image.meta.name, error=error.message)
            await self._ended(image, run, error)
        except Exception as error:
            log.exception("task failed", task=task_id, image=image.meta.name)
            await self._ended(image, run, unexpected(error, image))

    async def _create(self, image: Image, run: TaskRun) -> None:
        while True:
            made = await make_image(self.environment, image, run)
            async with self.environment.images_lock:
                # Another image of this very content may have been removed meanwhile.
                if not self.environment.directory.image(made.digest).is_dir():
                    continue
                self._commit()
                await self._ready(image, run, made)
                return

    async def _ready(self, image: Image, run: TaskRun, made: MadeImage) -> None:
        def change(record: Image) -> Image:
            status = _ready(made)
            if record.status.state is ImageState.REMOVING:  # its removal waits: nobody may use it
                status = msgspec.structs.replace(status, state=ImageState.REMOVING)
            return msgspec.structs.replace(record, status=status)

        await finish(
            self.environment,
            Image,
            self.id,
            run.id,
            change=change,
            result={"image": self.id, "digest": made.digest},
            event=("image.ready", f"{image.label} is ready", EventLevel.INFO),
        )

    def _commit(self) -> None:
        if self._under is not None:
            self._under.committed = True

    async def _remove(self, image: Image, run: TaskRun) -> None:
        listing = await self.environment.store.list(VM)
        if any(item.record.spec.image == image.meta.id for item in listing.items):
            raise InUseError(
                f"a VM was made from {image.label} meanwhile",
                object=image.label,
                action="remove that VM first",
            )
        await self._gone(image, run, None, "image.removed", f"{image.label} was removed")

    async def _ended(self, image: Image, run: TaskRun, error: UndercroftError | None) -> None:
        """An image that could not be made leaves nothing behind but its task and an event."""
        if run.task.spec.verb == "image.remove":
            await finish(
                self.environment,
                Image,
                self.id,
                run.id,
                change=_ready_again,
                error=error,
                cancelled=error is None,
            )
            return
        told = "was cancelled" if error is None else f"failed: {error.message}"
        await self._gone(
            image, run, error, "image.failed", f"making {image.label} {told}", error is None
        )

    async def _gone(
        self,
        image: Image,
        run: TaskRun,
        error: UndercroftError | None,
        event: str,
        message: str,
        cancelled: bool = False,
    ) -> None:
        self._commit()

        def extra(record: Image) -> tuple[list[Put], list[Delete], list[Release]]:
            return [], [], [Release(scope("image"), record.meta.name, record.meta.id)]

        async with self.environment.images_lock:
            await remove_image(self.environment, image)
            await finish(
                self.environment,
                Image,
                self.id,
                run.id,
                change=lambda record: None,
                extra=extra,
                error=error,
                cancelled=cancelled,
                event=(event, message, EventLevel.ERROR if error else EventLevel.INFO),
            )


def _ready(made: MadeImage) -> ImageStatus:
    return ImageStatus(
        state=ImageState.READY, digest=made.digest, size=made.size, content=made.content
    )


def _ready_again(image: Image) -> Image:
    """An image that could not be removed is as it was."""
    if image.status.content is None:
        return image
    return msgspec.structs.replace(
        image, status=msgspec.structs.replace(image.status, state=ImageState.READY)
    )
