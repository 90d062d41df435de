"""Images by a name of the catalogue."""

from __future__ import annotations

import pytest

from tests.unit.operations.world import World, holding
from undercroft.model.errors import ForbiddenError, InvalidError, NotFoundError
from undercroft.model.image import Image, ImageSourceKind
from undercroft.model.requests import ImageCreate
from undercroft.operations.access import SYSTEM
from undercroft.storage.catalogue import CatalogueEntry, load_catalogue


@pytest.fixture(autouse=True)
def stocked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def catalogue() -> dict[str, CatalogueEntry]:
        return load_catalogue()

    monkeypatch.setattr(world.services, "catalogue", catalogue)


async def create(world: World, value: str, source: str = "catalogue") -> None:
    request = ImageCreate(source=ImageSourceKind(source), value=value)
    await world.operations.images.create(SYSTEM, request)


async def test_it_is_listed(world: World) -> None:
    listed = await world.operations.images.catalogue(holding("image.view"))
    entry = next(entry for entry in listed if entry["name"] == "ubuntu:24.04")
    assert entry["user"] == "ubuntu"
    assert entry["memory"] == 1 << 30
    assert entry["format"] == "qcow2"
    assert entry["cloud-init"] is True
    with pytest.raises(ForbiddenError):
        await world.operations.images.catalogue(holding("vm.view"))


async def test_an_image_is_called_as_there(world: World) -> None:
    await create(world, "ubuntu:24.04")
    (image,) = await world.all(Image)
    assert image.meta.name == "ubuntu:24.04"
    assert image.spec.source is ImageSourceKind.CATALOGUE


@pytest.mark.parametrize(
    ("value", "action"),
    [("ubuntu:24.40", "ubuntu:24.04"), ("debian:12", "image build debian:12"), ("\u20ac", "see")],
)
async def test_what_is_not_there(world: World, value: str, action: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        await create(world, value)
    assert action in str(caught.value.action)
    assert await world.all(Image) == []


@pytest.mark.parametrize("url", ["https://me:secret@example.org/x", "http://example.org/a b"])
async def test_addresses_that_are_not_fetched(world: World, url: str) -> None:
    with pytest.raises(InvalidError) as caught:
        await create(world, url, "url")
    assert "secret" not in caught.value.message
    assert await world.all(Image) == []


async def test_a_name_without_the_compression(world: World) -> None:
    await create(world, "https://example.org/Disk-1.qcow2.xz", "url")
    (image,) = await world.all(Image)
    assert image.meta.name == "disk-1"
