"""Files of exports, whole and in parts, and uploads, over real HTTP."""

from __future__ import annotations

import os

import msgspec
import pytest

from tests.unit.api.world import World, ask
from undercroft.client.client import Client
from undercroft.model.base import Meta
from undercroft.model.errors import InvalidError
from undercroft.model.export import Export, ExportFile, ExportSpec, ExportState, ExportStatus
from undercroft.model.names import new_id
from undercroft.model.transfer import ImportCreate, ImportSource
from undercroft.store.interface import Put, Transaction

SIZE = 300_000
KEY = "0123456789abcdef"


async def ready(world: World) -> tuple[str, bytes]:
    """An export with one file."""
    content, path = os.urandom(SIZE), world.directory.tmp / "x"
    path.write_bytes(content)
    id = new_id("export")
    export = Export(
        meta=Meta(id=id, name=id, created=1.0),
        spec=ExportSpec(source="vm web1", template="tpl-x", file="web1", host="host-x"),
        status=ExportStatus(
            state=ExportState.READY,
            files=(ExportFile(name="web1.ova", size=SIZE, sha256="", path=str(path)),),
        ),
    )
    await world.store.transact(Transaction(puts=[Put(export)]))
    return id, content


async def test_a_transfer_goes_on_from_any_byte(world: World) -> None:
    id, content = await ready(world)
    for start in (0, 1, 123_456, SIZE - 1, SIZE):

        def read(client: Client, start: int = start) -> bytes:
            return b"".join(client.exports.read(id, "web1.ova", start))

        assert await ask(world, read) == content[start:], start


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        (None, 200, slice(0, SIZE)),
        ("bytes=0-", 206, slice(0, SIZE)),
        ("bytes=10-19", 206, slice(10, 20)),
        (f"bytes=10-{SIZE * 2}", 206, slice(10, SIZE)),
    ],
)
async def test_parts(world: World, asked: str | None, status: int, expected: slice) -> None:
    id, content = await ready(world)
    headers = {"range": asked} if asked else {}

    def read(client: Client) -> tuple[int, bytes, str | None]:
        response = client.raw.request("GET", f"/v1/exports/{id}/files/web1.ova", headers=headers)
        return response.status, response.read(), response.headers.get("content-range")

    found = await ask(world, read)
    assert found[:2] == (status, content[expected])
    if status == 206:
        assert found[2] == f"bytes {expected.start}-{expected.stop - 1}/{SIZE}"


@pytest.mark.parametrize("asked", ["bytes=5-1", "bytes=-5", "lines=1-2", f"bytes={SIZE + 1}-"])
async def test_parts_that_there_are_not(world: World, asked: str) -> None:
    id, _ = await ready(world)

    def read(client: Client) -> None:
        client.raw.request("GET", f"/v1/exports/{id}/files/web1.ova", headers={"range": asked})

    with pytest.raises(InvalidError):
        await ask(world, read)


async def test_what_is_sent_in_pieces_becomes_a_vm(world: World) -> None:
    content = os.urandom(200_000)

    def work(client: Client) -> str:
        assert client.imports.upload_status(KEY).size == 0
        client.imports.append(KEY, 0, content[:50_000])
        client.imports.append(KEY, 50_000, iter([content[50_000:60_000], content[60_000:]]))
        assert client.imports.examine(ImportSource(upload=KEY)).name == "web1"
        task = client.imports.create(ImportCreate(upload=KEY))
        assert client.vms.get(task.spec.object.id).meta.name == "web1"
        return task.spec.verb

    assert await ask(world, work) == "vm.create"
    assert world.host.uploads[KEY] == content


def test_requests_are_all_that_the_types_say() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"upload": 5}', type=ImportCreate)
