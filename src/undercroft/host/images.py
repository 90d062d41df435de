"""Makes and removes images: one worker per image that has something to do."""

from __future__ import annotations

import msgspec

from undercroft.host.imaging import MadeImage, make_image, remove_image
from undercroft.host.outcome import TaskRun, finish
from undercroft.host.worker import Worker
from undercroft.model.errors import InUseError, UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.image import Image, ImageState, ImageStatus
from undercroft.model.layer import Layer
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.context import scope
from undercroft.operations.images import begins_as
from undercroft.store.interface import Delete, Put, Release


class ImageWorker(Worker[Image]):
    """Carries out the tasks of one image, one at a time."""

    kind = Image

    async def carry_out(self, record: Image, run: TaskRun) -> None:
        """Makes or removes the image."""
        if run.task.spec.verb == "image.remove":
            await self._remove(record, run)
        else:
            await self._create(record, run)

    async def _create(self, image: Image, run: TaskRun) -> None:
        while True:
            made = await make_image(self.environment, image, run)
            async with self.environment.images_lock:
                # Another image of this very content may have been removed meanwhile.
                if not self.environment.directory.image(made.digest).is_dir():
                    continue
                self.commit()
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

    async def _remove(self, image: Image, run: TaskRun) -> None:
        listing = await self.environment.store.list(VM)
        if any(item.record.spec.image == image.meta.id for item in listing.items):
            raise InUseError(
                f"a VM was made from {image.label} meanwhile",
                object=image.label,
                action="remove that VM first",
            )
        layers = await self.environment.store.list(Layer)
        volumes = await self.environment.store.list(Volume)
        if any(item.record.spec.image == image.meta.id for item in layers.items) or any(
            begins_as(item.record, image) for item in volumes.items
        ):
            raise InUseError(
                f"a volume was made from {image.label} meanwhile",
                object=image.label,
                action="remove that volume first: croft volume ls",
            )
        await self._gone(image, run, None, "image.removed", f"{image.label} was removed")

    async def ended(self, record: Image, run: TaskRun, error: UndercroftError | None) -> None:
        """An image that could not be made leaves nothing behind but its task and an event."""
        image = record
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
        self.commit()

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
