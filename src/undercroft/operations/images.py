"""Images: building, importing, looking, removing."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from undercroft.model.base import Meta
from undercroft.model.checks import check_user
from undercroft.model.errors import (
    AlreadyExistsError,
    InUseError,
    InvalidError,
    StaleError,
)
from undercroft.model.image import Image, ImageSourceKind, ImageSpec, ImageState
from undercroft.model.layer import Layer
from undercroft.model.names import check_name, new_id
from undercroft.model.requests import ImageCreate
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    find,
    new_event,
    new_task,
    pending,
    scope,
)
from undercroft.storage.catalogue import find_entry
from undercroft.storage.http import check_url
from undercroft.store.interface import (
    Check,
    Claim,
    Delete,
    Listing,
    Put,
    Release,
    Transaction,
    Versioned,
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_UPLOAD = re.compile(r"upload-[a-z0-9]{1,64}")  # see HostServices.upload_path
_FIRMWARE = ("bios", "uefi", "kernel")


class ImageOperations:
    """Every verb on images."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def create(self, caller: Caller, request: ImageCreate) -> Task:
        """Writes a new image and the task that builds, fetches or imports it.

        With ``replace`` the name moves from the older image, which then keeps only its id.

        Raises:
            InvalidError: the source, checksum or name makes no sense.
            NotFoundError: the catalogue has no such image.
            AlreadyExistsError: the name is taken.
        """
        caller.require("image.create")
        if request.source is ImageSourceKind.FILE:
            caller.require("host.files")
        _check(request)
        if request.source is ImageSourceKind.CATALOGUE:
            find_entry(await self._context.services.catalogue(), request.value)
        name = check_name(request.name or _suggest_name(request), "image")
        now = self._context.clock()
        for _ in range(ATTEMPTS):
            image = Image(
                meta=Meta(id=new_id("image"), name=name, created=now),
                spec=ImageSpec(
                    source=request.source,
                    value=request.value,
                    sha256=request.sha256.lower() if request.sha256 else None,
                    format=request.format,
                    firmware=request.firmware,
                    user=request.user,
                ),
            )
            task = new_task(self._context, "image.create", image, caller.name)
            image = msgspec.structs.replace(image, tasks=(task.meta.id,))
            event = new_event(
                now, "image.created", image, f"{image.label} is being made", by=caller.name
            )
            checks: list[Check] = []
            releases: list[Release] = []
            puts = [Put(image), Put(task), Put(event)]
            holder = await self._context.store.resolve(scope("image"), name)
            if holder is not None:
                older = await self._context.store.get(Image, holder)
                if older is not None:
                    same = await pending(self._context.store, older.record, ("image.create",))
                    if same is not None and _same_source(older.record, image):
                        return same
                    if not request.replace:
                        raise AlreadyExistsError(
                            f"image {name} already exists",
                            object=f"image {name}",
                            action="choose another name, remove it, or add --replace",
                        )
                    checks.append(Check(Image, holder, older.revision))
                    meta = msgspec.structs.replace(older.record.meta, name=holder)
                    puts.append(Put(msgspec.structs.replace(older.record, meta=meta)))
                releases.append(Release(scope("image"), name, holder))
            try:
                await self._context.store.transact(
                    Transaction(
                        checks=checks,
                        releases=releases,
                        claims=[Claim(scope("image"), name, image.meta.id)],
                        puts=puts,
                    )
                )
            except (StaleError, AlreadyExistsError):
                continue
            return task
        raise StaleError(f"others keep changing image {name}", object=f"image {name}")

    def upload_path(self, caller: Caller, name: str) -> Path:
        """Where content that is being sent for an image goes; its last part is the ``value`` of the
        `ImageCreate` (source UPLOAD) that follows."""
        caller.require("image.create")
        return self._context.services.upload_path(name)

    async def get(self, caller: Caller, ref: str) -> Versioned[Image]:
        """The image with this name or id."""
        caller.require("image.view")
        return await find(self._context.store, Image, ref)

    async def list(self, caller: Caller) -> Listing[Image]:
        """All images."""
        caller.require("image.view")
        return await self._context.store.list(Image)

    async def catalogue(self, caller: Caller) -> builtins.list[dict[str, Any]]:
        """The images that can be fetched by name, each as a `CatalogueEntry`.

        Raises:
            DataError: the user's catalogue makes no sense.
        """
        caller.require("image.view")
        entries = await self._context.services.catalogue()
        return [msgspec.to_builtins(entry) for entry in entries.values()]

    async def remove(self, caller: Caller, ref: str, force: bool = False) -> Task:
        """Removes an image that no VM was made from. ``force`` cancels its making.

        Raises:
            InUseError: VMs need it, or it is still being made.
        """
        caller.require("image.remove")
        store = self._context.store
        for _ in range(ATTEMPTS):
            found = await find(store, Image, ref)
            image = found.record
            same = await pending(store, image, ("image.remove",))
            if same is not None:
                return same
            users: list[VM | Template | Volume] = [
                v.record
                for v in (await store.list(VM)).items
                if v.record.spec.image == image.meta.id and not v.record.spec.passing
            ]
            made = [
                t
                for t in (await store.list(Template)).items
                if t.record.status.shape is not None
                and t.record.status.shape.image == image.meta.id
            ]
            users += [t.record for t in made if not t.record.spec.warm]
            users += await _volumes_on(self._context, image)
            if users:
                some = ", ".join(user.label for user in users[:5])
                raise InUseError(
                    f"{image.label} is used by {some}" + (" and others" if users[5:] else ""),
                    object=image.label,
                    action="remove these first",
                    users=[user.meta.id for user in users],
                )
            checks = [Check(Image, image.meta.id, found.revision)]
            # What was made of it by itself goes with it.
            checks += [Check(Template, t.record.meta.id, t.revision) for t in made]
            deletes = [Delete(Template, t.record.meta.id) for t in made]
            names = [Release(scope("template"), t.record.meta.name, t.record.meta.id) for t in made]
            puts: list[Put] = []
            for id in image.tasks:
                making = await store.get(Task, id)
                if making is None or making.record.status.state.final:
                    continue
                if not force:
                    raise InUseError(
                        f"{image.label} is still being made",
                        object=image.label,
                        action=f"wait, or cancel it: croft task cancel {id}",
                    )
                spec = msgspec.structs.replace(making.record.spec, cancel=True)
                checks.append(Check(Task, id, making.revision))
                puts.append(Put(msgspec.structs.replace(making.record, spec=spec)))
            task = new_task(self._context, "image.remove", image, caller.name)
            wanted = msgspec.structs.replace(
                image,
                tasks=(*image.tasks, task.meta.id),
                status=msgspec.structs.replace(image.status, state=ImageState.REMOVING),
            )
            try:
                await store.transact(
                    Transaction(
                        checks=checks,
                        deletes=deletes,
                        releases=names,
                        puts=[Put(wanted), Put(task), *puts],
                    )
                )
            except StaleError:
                continue
            return task
        raise StaleError(f"others keep changing image {ref}", object=f"image {ref}")


async def _volumes_on(context: Context, image: Image) -> builtins.list[Volume]:
    """The volumes that need an image: some layer of theirs lies on it, or is about to."""
    layers = {i.record.meta.id: i.record for i in (await context.store.list(Layer)).items}
    found = []
    for item in (await context.store.list(Volume)).items:
        volume = item.record
        if volume.spec.vm is not None:
            continue  # its VM is looked at already
        at = layers.get(volume.status.head)
        while at is not None and at.spec.parent is not None:
            at = layers.get(at.spec.parent)
        if begins_as(volume, image) or (at is not None and at.spec.image == image.meta.id):
            found.append(volume)
    return found


def begins_as(volume: Volume, image: Image) -> bool:
    """Whether a volume that is not there yet is to begin as an image."""
    return volume.spec.image == image.meta.id and not volume.status.head


def _same_source(older: Image, newer: Image) -> bool:
    return older.spec == newer.spec


def _suggest_name(request: ImageCreate) -> str:
    if request.source in (ImageSourceKind.BUILD, ImageSourceKind.CATALOGUE):
        return request.value
    path = urlsplit(request.value).path if request.source is ImageSourceKind.URL else request.value
    stem = re.sub(r"\.(xz|gz|zst|bz2)$", "", Path(path).name.lower())
    stem = re.sub(r"\.(qcow2|raw|img|vmdk|vhdx?|vdi|iso)$", "", stem)
    stem = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", stem))
    return stem[:60].strip("-._") or "imported"


def _check(request: ImageCreate) -> None:
    if request.sha256 is not None and _SHA256.fullmatch(request.sha256.lower()) is None:
        raise InvalidError("a SHA-256 checksum has 64 hexadecimal digits")
    if request.firmware is not None and request.firmware not in _FIRMWARE:
        raise InvalidError(
            f"firmware {request.firmware[:40]!r} is not known", action="use bios, uefi or kernel"
        )
    if not request.value or len(request.value) > 4096 or not request.value.isprintable():
        raise InvalidError("the source of the image is empty or not printable")
    if request.source is ImageSourceKind.FILE and not request.value.startswith("/"):
        raise InvalidError(
            f"{request.value[:80]!r} is not an absolute path", action="begin it with /"
        )
    if request.source is ImageSourceKind.UPLOAD and _UPLOAD.fullmatch(request.value) is None:
        raise InvalidError(f"{request.value[:80]!r} is not an upload")
    if request.source is ImageSourceKind.URL:
        check_url(request.value)
    if request.user is not None:
        check_user(request.user)
