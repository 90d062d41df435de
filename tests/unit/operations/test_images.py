"""Images: making, replacing and removing them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tests.unit.operations.world import World, holding
from undercroft.model.errors import (
    AlreadyExistsError,
    ForbiddenError,
    InUseError,
    InvalidError,
    NotFoundError,
)
from undercroft.model.image import Image, ImageSourceKind, ImageState
from undercroft.model.requests import ImageCreate, VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import VM
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope
from undercroft.store.interface import update

BUILD, URL = ImageSourceKind.BUILD, ImageSourceKind.URL
FILE, UPLOAD = ImageSourceKind.FILE, ImageSourceKind.UPLOAD


async def create(world: World, source: ImageSourceKind, value: str, **values: Any) -> Task:
    request = ImageCreate(source=source, value=value, **values)
    return await world.operations.images.create(SYSTEM, request)


async def image(world: World, ref: str) -> Image:
    return (await world.operations.images.get(SYSTEM, ref)).record


async def made(world: World, task: Task) -> None:
    await world.end(task.meta.id, TaskState.SUCCEEDED)
    await update(
        world.store,
        Image,
        task.spec.object.id,
        lambda i: msgspec.structs.replace(
            i, tasks=(), status=msgspec.structs.replace(i.status, state=ImageState.READY)
        ),
    )


@pytest.mark.parametrize(
    ("source", "value", "name"),
    [
        (BUILD, "tiny", "tiny"),
        (BUILD, "debian:12", "debian:12"),
        (URL, "https://example.org/images/Debian-12.QCOW2?x=y#z", "debian-12"),
        (URL, "http://[::1]:8080/a.img", "a"),
        (URL, "http://example.org", "imported"),
        (FILE, "/srv/my disk...raw", "my-disk"),
        (FILE, "/srv/a..b.vmdk", "a.b"),
        (FILE, "/srv/" + "x" * 300 + ".vhdx", "x" * 60),
    ],
)
async def test_names_come_from_the_source(
    world: World, source: ImageSourceKind, value: str, name: str
) -> None:
    task = await create(world, source, value)
    record = await image(world, name)
    assert record.tasks == (task.meta.id,)
    assert record.status.state is ImageState.PENDING
    assert (record.spec.source, record.spec.value) == (source, value)
    assert task.spec.verb == "image.create"


@pytest.mark.parametrize(
    ("source", "value", "more"),
    [
        (BUILD, "", {}),
        (BUILD, "debian\n", {}),
        (BUILD, "Debian", {}),
        (BUILD, "tiny", {"name": "no good"}),
        (BUILD, "tiny", {"sha256": "12"}),
        (BUILD, "tiny", {"firmware": "coreboot"}),
        (BUILD, "tiny", {"user": "Not A User"}),
        (FILE, "relative/path", {}),
        (FILE, "/a\0b", {}),
        (FILE, "/" + "x" * 5000, {}),
        (URL, "ftp://example.org/x", {}),
        (URL, "file:///etc/passwd", {}),
        (URL, "https:///nothing", {}),
        (URL, "http://[::1", {}),
        (URL, "http://example.org:port/", {}),
        (UPLOAD, "../store.db", {}),
        (UPLOAD, "..", {}),
        (UPLOAD, ".", {}),
        (UPLOAD, "volume-0123456789abcdef", {}),
        (UPLOAD, "/etc/passwd", {}),
    ],
)
async def test_nonsense_is_refused(
    world: World, source: ImageSourceKind, value: str, more: dict[str, Any]
) -> None:
    with pytest.raises(InvalidError):
        await create(world, source, value, **more)
    assert await world.all(Image) == []
    assert await world.all(Task) == []


async def test_an_upload_goes_where_the_host_says(world: World) -> None:
    path = world.operations.images.upload_path(SYSTEM, "../../etc/passwd")
    await create(world, UPLOAD, path.name, name="mine")
    assert (await image(world, "mine")).spec.value == path.name


async def test_checksums_are_compared_in_lower_case(world: World) -> None:
    await create(world, BUILD, "tiny", sha256="AB" * 32)
    assert (await image(world, "tiny")).spec.sha256 == "ab" * 32


async def test_files_of_the_host_need_a_privilege_of_their_own(world: World) -> None:
    request = ImageCreate(source=FILE, value="/etc/shadow", name="secrets")
    with pytest.raises(ForbiddenError, match=r"host\.files"):
        await world.operations.images.create(holding("image.create"), request)
    caller = holding("image.create", "host.files")
    await world.operations.images.create(caller, request)


async def test_a_repeat_while_it_is_being_made_gives_the_same_task(world: World) -> None:
    tasks = await asyncio.gather(*(create(world, BUILD, "tiny") for _ in range(10)))
    assert len({task.meta.id for task in tasks}) == 1
    assert len(await world.all(Image)) == 1


async def test_a_taken_name_is_refused(world: World) -> None:
    await made(world, await create(world, BUILD, "tiny"))
    with pytest.raises(AlreadyExistsError, match="tiny") as caught:
        await create(world, BUILD, "tiny")
    assert "--replace" in (caught.value.action or "")
    with pytest.raises(AlreadyExistsError):
        await create(world, URL, "https://example.org/x.qcow2", name="tiny")


async def test_replacing_moves_the_name(world: World) -> None:
    first = await create(world, BUILD, "tiny")
    await made(world, first)
    second = await create(world, BUILD, "tiny", replace=True)
    old = await image(world, first.spec.object.id)
    assert old.meta.name == old.meta.id
    assert (await image(world, "tiny")).meta.id == second.spec.object.id
    assert await world.store.resolve(scope("image"), "tiny") == second.spec.object.id


async def test_many_replacements_at_once_leave_one_holder(world: World) -> None:
    await made(world, await create(world, BUILD, "tiny"))
    await asyncio.gather(
        *(
            create(world, URL, f"https://example.org/{n}.raw", name="tiny", replace=True)
            for n in range(10)
        )
    )
    images = await world.all(Image)
    assert len(images) == 11
    holder = await world.store.resolve(scope("image"), "tiny")
    assert [i.meta.id for i in images if i.meta.name == "tiny"] == [holder]


async def test_what_vms_were_made_from_stays(world: World) -> None:
    await world.image("debian:12")
    for n in range(7):
        await world.created(f"web{n}", image="debian:12")
    with pytest.raises(InUseError, match="and others") as caught:
        await world.operations.images.remove(SYSTEM, "debian:12", force=True)
    assert len(caught.value.data["users"]) == 7


async def test_removing(world: World) -> None:
    await world.image("debian:12")
    task = await world.operations.images.remove(SYSTEM, "debian:12")
    record = await image(world, "debian:12")
    assert record.status.state is ImageState.REMOVING
    assert record.tasks == (task.meta.id,)
    again = await world.operations.images.remove(SYSTEM, "debian:12")
    assert again.meta.id == task.meta.id
    with pytest.raises(NotFoundError):
        await world.operations.images.remove(SYSTEM, "nothing")


async def test_what_is_being_made_is_removed_by_force_only(world: World) -> None:
    making = await create(world, BUILD, "tiny")
    with pytest.raises(InUseError) as caught:
        await world.operations.images.remove(SYSTEM, "tiny")
    assert making.meta.id in (caught.value.action or "")
    task = await world.operations.images.remove(SYSTEM, "tiny", force=True)
    assert (await world.task(making.meta.id)).spec.cancel
    assert (await image(world, "tiny")).tasks == (making.meta.id, task.meta.id)


async def test_a_vm_made_at_the_same_moment(world: World) -> None:
    """Whoever comes first has it: a VM whose image is going, or one that is not made. The host
    refuses to remove an image that a VM was made from, so the VM keeps it."""
    for n in range(10):
        await world.image(f"image{n}")
        made, removal = await asyncio.gather(
            world.operations.vms.create(SYSTEM, VMCreate(name=f"web{n}", image=f"image{n}")),
            world.operations.images.remove(SYSTEM, f"image{n}"),
            return_exceptions=True,
        )
        record = await image(world, f"image{n}")
        users = [vm for vm in await world.all(VM) if vm.spec.image == record.meta.id]
        assert len(users) == isinstance(made, Task)
        assert isinstance(made, Task) or isinstance(removal, Task)
        assert (record.status.state is ImageState.REMOVING) == isinstance(removal, Task)
