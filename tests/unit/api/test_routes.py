from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.api.world import World, ask, finish_task
from undercroft.client.client import Client
from undercroft.client.raw import Raw
from undercroft.client.transport import Response
from undercroft.model.errors import (
    AlreadyExistsError,
    GuestAgentError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    StaleError,
    TooLargeError,
    UndercroftError,
    WrongStateError,
)
from undercroft.model.image import DiskFormat
from undercroft.model.names import new_id
from undercroft.model.requests import (
    ExecRequest,
    ImageCreate,
    StopRequest,
    VMChange,
    VMCreate,
)
from undercroft.model.task import TaskState
from undercroft.model.vm import VMState
from undercroft.operations.access import SYSTEM


async def get(world: World, path: str, **headers: str) -> tuple[Response, bytes]:
    """An answer as it is, with its status."""

    def run() -> tuple[Response, bytes]:
        with Raw(world.endpoint) as raw:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            response = raw.transport.request("GET", path, headers=names)
            return response, response.read()

    return await asyncio.to_thread(run)


async def test_version(world: World) -> None:
    version = await ask(world, lambda client: client.version())
    assert version.product == "Undercroft"
    assert version.api == "v1"
    assert version.data == str(world.directory.path)
    assert version.host == world.operations.host


async def test_health_asks_nobody_who_they_are(world: World) -> None:
    response, body = await get(world, "/healthz")
    assert (response.status, body) == (200, b"ok\n")


async def test_a_vm_from_beginning_to_end(world: World) -> None:
    task = await ask(
        world,
        lambda c: c.vms.create(VMCreate(name="web1", disk=1 << 30, labels={"env": "prod"})),
    )
    assert task.spec.verb == "vm.create"
    vm, revision = await ask(world, lambda c: c.vms.get_versioned("web1"))
    assert vm.meta.id == task.spec.object.id
    assert vm.meta.labels == {"env": "prod"}
    changed = await ask(world, lambda c: c.vms.set("web1", VMChange(cpus=3), if_match=revision))
    assert changed.spec.cpus == 3
    with pytest.raises(StaleError):
        await ask(world, lambda c: c.vms.set(vm.meta.id, VMChange(cpus=4), if_match=revision))
    with pytest.raises(AlreadyExistsError):
        await ask(world, lambda c: c.vms.create(VMCreate(name="web1", disk=1 << 30)))
    removal = await ask(world, lambda c: c.vms.remove("web1", force=True))
    assert removal.spec.verb == "vm.remove"


async def test_accepted_tells_where_to_follow(world: World) -> None:
    def work(client: Client) -> Response:
        return client.raw.request("POST", "/v1/vms", body=b'{"name": "a", "disk": 1073741824}')

    response = await ask(world, work)
    assert response.status == 202
    location = response.headers["location"]
    task = await ask(world, lambda c: c.raw.get(location))
    assert task["spec"]["verb"] == "vm.create"


async def test_every_verb_reaches_its_operation(world: World) -> None:
    verbs = ("start", "stop", "restart", "reset", "pause", "resume", "suspend")
    vms = await world.add_vms(len(verbs), VMState.RUNNING)

    def work(client: Client) -> list[str]:
        found = []
        for verb, vm in zip(verbs, vms, strict=True):
            try:
                found.append(str(getattr(client.vms, verb)(vm.meta.id).spec.verb))
            except WrongStateError as error:
                found.append(f"not while {error.data['state']}")
        return found

    found = await ask(world, work)
    for verb, told in zip(verbs, found, strict=True):
        assert told in (f"vm.{verb}", "not while running"), verb
    assert found[1] == "vm.stop"


async def test_stop_takes_how(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    task = await ask(world, lambda c: c.vms.stop("web0", StopRequest(force=True)))
    assert task.spec.arguments["force"] is True


async def test_an_etag_spares_the_answer(world: World) -> None:
    await world.add_vms(2)
    response, _ = await get(world, "/v1/vms/web0")
    tag = response.headers["etag"]
    for known in (tag, f'"7", {tag}'):
        again, body = await get(world, "/v1/vms/web0", if_none_match=known)
        assert (again.status, body, again.headers["etag"]) == (304, b"", tag)
    listing, _ = await get(world, "/v1/vms")
    again, body = await get(world, "/v1/vms", if_none_match=listing.headers["etag"])
    assert (again.status, body) == (304, b"")
    await ask(world, lambda c: c.vms.set("web0", VMChange(cpus=2)))
    changed, body = await get(world, "/v1/vms/web0", if_none_match=tag)
    assert (changed.status, json.loads(body)["spec"]["cpus"]) == (200, 2)


async def test_an_etag_that_is_none(world: World) -> None:
    await world.add_vms(1)

    def work(client: Client, tag: str) -> None:
        client.raw.request("PATCH", "/v1/vms/web0", headers={"if-match": tag}, body=b"{}")

    for tag in ("x", '"1x"', "1,2", '"' + "9" * 30 + '"'):
        with pytest.raises(InvalidError, match="If-Match"):
            await ask(world, lambda c, tag=tag: work(c, tag))  # type: ignore[misc]


async def test_the_quick_way_answers_like_the_long_one(world: World) -> None:
    """`undercroft.api.hot` and the controllers must not differ."""
    await world.add_vms(1)
    task = await ask(world, lambda c: c.vms.create(VMCreate(name="x", disk=1 << 30)))
    paths = ["/v1/vms/web0", "/v1/vms/none", f"/v1/tasks/{task.meta.id}", "/v1/hosts/self"]
    paths += ["/v1/images/none", "/v1/volumes/none", "/v1/vms/%C3%A9"]
    for path in paths:
        quick, quick_body = await get(world, path)
        # A slash at the end goes past the quick way.
        long, long_body = await get(world, path + "/")
        assert (quick.status, quick_body) == (long.status, long_body)
        for name in ("etag", "content-type", "cache-control", "content-length"):
            assert quick.headers.get(name) == long.headers.get(name), (path, name)


async def test_every_error_is_a_problem(world: World) -> None:
    cases = [
        ("GET", "/", 404, "not-found"),
        ("GET", "/v2", 404, "not-found"),
        ("GET", "/v1/vms/a/b/c", 404, "not-found"),
        ("GET", "/v1/vms/none", 404, "not-found"),
        ("GET", "/v1/tasks/none", 404, "not-found"),
        ("GET", "/v1/hosts/none", 404, "not-found"),
        ("PUT", "/v1/vms", 405, "invalid"),
        ("POST", "/healthz", 405, "invalid"),
        ("GET", "/v1/vms?filtr=x", 400, "invalid"),
        ("DELETE", "/v1/vms/x?forse=true", 400, "invalid"),
        ("DELETE", "/v1/vms/x?force=maybe", 400, "invalid"),
        ("GET", "/v1/vms?limit=ten", 400, "invalid"),
        ("GET", "/v1/vms?limit=0", 400, "invalid"),
        ("GET", "/v1/vms?limit=99999999999999999999999", 400, "invalid"),
        ("GET", "/v1/events?limit=5000", 400, "invalid"),
        ("GET", "/v1/events?after=-1", 400, "invalid"),
        ("GET", "/v1/watch?kinds=nonsense", 400, "invalid"),
        ("GET", "/v1/watch?from=x", 400, "invalid"),
        ("GET", "/v1/tasks/x?wait=1000", 400, "invalid"),
        ("GET", "/v1/tasks/x?wait=nan", 400, "invalid"),
        ("GET", "/v1/vms/none/console", 426, "invalid"),
        ("GET", "/v1/vms/none/files", 400, "invalid"),
    ]

    def work(client: Client) -> list[tuple[Response, bytes]]:
        found = []
        for method, path, _, _ in cases:
            response = client.raw.transport.request(method, path)
            found.append((response, response.read()))
        return found

    for case, (response, body) in zip(cases, await ask(world, work), strict=True):
        _, _, status, code = case
        assert response.status == status, case
        assert response.headers["content-type"] == "application/problem+json", case
        problem = json.loads(body)
        assert (problem["code"], problem["status"]) == (code, status), case
        assert problem["type"] == f"urn:undercroft:error:{code}"
        assert problem["detail"]
        if status == 405:
            assert "GET" in response.headers["allow"]


async def test_a_body_that_makes_no_sense(world: World) -> None:
    cases = [
        (b"", "no body"),
        (b"   ", "no body"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"[" * 100_000, "object"),
        (b'{"nmae": "x"}', "nmae"),
        (b'{"name": 3}', "$.name"),
        (b'{"cpus": "3"}', "$.cpus"),
        (b'{"cpus": 1.5}', "$.cpus"),
        (b'{"cpus": 99999999999999999999999999}', "CPUs"),
        (b'{"ports": [{"mac": 5}]}', "$.ports[0].mac"),
        (b'{"machine": "pc"}', "$.machine"),
        (b'{"guest": {"user": "a", "x": 1}}', "$.guest"),
        (b'{"labels": {"a": 1}}', "$.labels"),
        (b'{"name": "x"} {"name": "y"}', "not JSON"),
        (b'{"name": "\xc3\x28"}', "not JSON"),
    ]

    def work(client: Client, body: bytes) -> str:
        with pytest.raises(InvalidError) as caught:
            client.raw.request("POST", "/v1/vms", body=body)
        return caught.value.message

    for body, words in cases:
        assert words in await ask(world, lambda c, body=body: work(c, body))  # type: ignore[misc]
    assert (await world.operations.vms.list(SYSTEM)).items == []


async def test_a_body_that_is_too_large(world: World) -> None:
    body = b'{"name": "' + b"x" * (2 << 20) + b'"}'
    with pytest.raises(TooLargeError):
        await ask(world, lambda c: c.raw.request("POST", "/v1/vms", body=body))

    def endless() -> Any:
        while True:
            yield b" " * 65536

    with pytest.raises(TooLargeError):
        await ask(world, lambda c: c.raw.request("POST", "/v1/vms", body=endless()))


async def test_a_fault_of_ours_keeps_its_secrets(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    with pytest.raises(UndercroftError) as caught:
        await ask(world, lambda c: c.vms.exec("web0", ExecRequest(argv=("break",))))
    assert caught.value.code == "internal"
    assert "secret" not in str(caught.value.problem())


async def test_programs_and_files_of_a_guest(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    result = await ask(world, lambda c: c.vms.exec("web0", ExecRequest(argv=("uname", "-a"))))
    assert (result.exit_code, result.stdout) == (0, b"uname -a")
    content = bytes(range(256)) * 5000
    size = await ask(world, lambda c: c.vms.write_file("web0", "/tmp/ü x", content, 0o640))
    assert (size, world.host.files["/tmp/ü x:mode"]) == (len(content), b"416")
    assert world.host.files["/tmp/ü x"] == content
    assert (
        b"".join(await ask(world, lambda c: list(c.vms.read_file("web0", "/tmp/ü x")))) == content
    )
    pieces = iter([b"a" * 100_000, b"b" * 200_000])
    assert await ask(world, lambda c: c.vms.write_file("web0", "/pieces", pieces)) == 300_000
    world.host.files["/empty"] = b""
    assert await ask(world, lambda c: list(c.vms.read_file("web0", "/empty"))) == []
    with pytest.raises(GuestAgentError, match="does not exist"):
        await ask(world, lambda c: list(c.vms.read_file("web0", "/none")))
    with pytest.raises(InvalidError, match="mode"):
        await ask(
            world, lambda c: c.raw.request("PUT", "/v1/vms/web0/files?path=/x&mode=9", body=b"")
        )


async def test_a_file_that_breaks_off_is_not_taken_for_whole(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    world.host.files["/cut"] = b"x" * 100_000
    with pytest.raises(UndercroftError) as caught:
        await ask(world, lambda c: list(c.vms.read_file("web0", "/cut")))
    assert caught.value.code == "daemon"


async def test_screenshot_and_log(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    assert (await ask(world, lambda c: c.vms.screenshot("web0"))).startswith(b"\x89PNG")
    text = (await ask(world, lambda c: c.vms.log("web0", 10))).decode()
    assert text == "ready \N{SNOWMAN}\n"
    response, _ = await get(world, "/v1/vms/web0/log")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


async def test_an_image_is_sent(world: World, tmp_path: Path) -> None:
    content = b"QFI\xfb" + bytes(3_000_000)
    digest = hashlib.sha256(content).hexdigest()
    file = tmp_path / "disk.qcow2"
    file.write_bytes(content)

    def work(client: Client) -> Any:
        with file.open("rb") as stream:
            return client.images.upload(stream, name="mine", format=DiskFormat.QCOW2, sha256=digest)

    task = await ask(world, work)
    assert task.spec.verb == "image.create"
    image = await ask(world, lambda c: c.images.get("mine"))
    assert (image.spec.sha256, image.spec.format) == (digest, DiskFormat.QCOW2)
    assert (world.host.tmp / image.spec.value).read_bytes() == content


async def test_an_image_that_is_refused_leaves_nothing(world: World) -> None:
    for name, sha256 in (("Bad Name", None), ("good", "xyz")):
        with pytest.raises(InvalidError):
            await ask(
                world,
                lambda c, name=name, sha256=sha256: c.images.upload(  # type: ignore[misc]
                    bytes(100_000), name=name, sha256=sha256
                ),
            )
    assert list(world.host.tmp.iterdir()) == []


async def test_an_upload_that_is_cut_off_leaves_nothing(world: World) -> None:
    def work() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(world.directory.socket))
            connection.sendall(
                b"POST /v1/images/upload?name=half HTTP/1.1\r\nhost: x\r\n"
                b"content-length: 10000000\r\n\r\n" + bytes(2_000_000)
            )

    await asyncio.to_thread(work)
    for _ in range(200):
        await asyncio.sleep(0.01)
        requests = world.server.statistics.requests
        if any(route.endswith("/upload") for _, route, _ in requests):
            break
    assert list(world.host.tmp.iterdir()) == []
    assert (await world.operations.images.list(SYSTEM)).items == []


async def test_images_by_source(world: World) -> None:
    await ask(world, lambda c: c.images.create(ImageCreate(source="build", value="tiny")))  # type: ignore[arg-type]
    (image,) = await ask(world, lambda c: c.images.list())
    assert image.meta.name == "tiny"
    task = await ask(world, lambda c: c.images.remove("tiny", force=True))
    assert task.spec.verb == "image.remove"


async def test_pages_follow_one_another(world: World) -> None:
    await world.add_vms(25)
    found: list[str] = []
    params: dict[str, object] = {"limit": 7, "sort": "-spec.cpus,meta.name", "fields": "meta.name"}
    for count in (7, 7, 7, 4):
        page = await ask(world, lambda c: c.raw.get("/v1/vms", params))
        assert len(page["items"]) == count
        assert (page["next"] is None) is (count == 4)
        found += [item["meta"]["name"] for item in page["items"]]
        params["cursor"] = page["next"]
    assert sorted(found) == sorted(f"web{number}" for number in range(25))
    filtered = await ask(world, lambda c: c.vms.list(filter="meta.labels.env==prod", limit=3))
    assert len(filtered) == 3


async def test_a_task_is_awaited(world: World) -> None:
    task = await ask(world, lambda c: c.vms.create(VMCreate(name="x", disk=1 << 30)))

    async def finish() -> None:
        await asyncio.sleep(0.2)
        await finish_task(world, task.meta.id, TaskState.SUCCEEDED)

    finishing = asyncio.ensure_future(finish())
    final = await ask(world, lambda c: c.tasks.wait(task, timeout=10))
    await finishing
    assert final.status.state is TaskState.SUCCEEDED
    assert (await ask(world, lambda c: c.tasks.cancel(task.meta.id))) == final


async def test_a_task_that_failed_raises_its_error(world: World) -> None:
    task = await ask(world, lambda c: c.vms.create(VMCreate(name="x", disk=1 << 30)))
    seen: list[str] = []

    async def fail() -> None:
        await asyncio.sleep(0.2)
        await finish_task(world, task.meta.id, TaskState.RUNNING)
        error = GuestAgentError("no answer", object="vm x", action="look", seconds=3)
        await finish_task(world, task.meta.id, TaskState.FAILED, error)

    failing = asyncio.ensure_future(fail())
    with pytest.raises(GuestAgentError, match="no answer") as caught:
        await ask(
            world,
            lambda c: c.tasks.wait(
                task.meta.id, timeout=10, progress=lambda task: seen.append(task.status.state)
            ),
        )
    await failing
    assert (caught.value.action, caught.value.data) == ("look", {"seconds": 3})
    assert seen == ["pending", "running", "failed"]


async def test_a_task_that_takes_too_long(world: World) -> None:
    task = await ask(world, lambda c: c.vms.create(VMCreate(name="x", disk=1 << 30)))
    with pytest.raises(UndercroftError, match="not done"):
        await ask(world, lambda c: c.tasks.wait(task, timeout=0.1))


async def test_check(world: World) -> None:
    report = await ask(world, lambda c: c.hosts.check(repair=True))
    assert report.checked == {"vms": 3}
    await ask(world, lambda c: c.raw.post("/v1/hosts/self/check"))
    assert world.host.repaired == [True, False]
    with pytest.raises(InvalidError):
        await ask(world, lambda c: c.raw.post("/v1/hosts/self/check", {"repare": True}))


async def test_hosts_and_volumes(world: World) -> None:
    host = await ask(world, lambda c: c.hosts.get("self"))
    assert host.meta.id == world.operations.host
    assert [found.meta.id for found in await ask(world, lambda c: c.hosts.list())] == [host.meta.id]
    await ask(world, lambda c: c.vms.create(VMCreate(name="x", disk=1 << 30)))
    (volume,) = await ask(world, lambda c: c.volumes.list())
    assert (await ask(world, lambda c: c.volumes.get(volume.meta.id))) == volume


async def test_events_are_listed(world: World) -> None:
    for name in ("a", "b", "c"):
        await ask(world, lambda c, name=name: c.vms.create(VMCreate(name=name, disk=1 << 30)))  # type: ignore[misc]
    events = await ask(world, lambda c: c.events.list())
    assert [event.object.name for event in events] == ["a", "b", "c"]
    assert [e.object.name for e in await ask(world, lambda c: c.events.list(limit=2))] == ["b", "c"]
    assert len(await ask(world, lambda c: c.events.list(object="b"))) == 1


async def test_fifty_at_once_on_one_vm(world: World) -> None:
    await world.add_vms(1)

    def change(client: Client, number: int) -> str:
        try:
            if number % 2:
                client.vms.set("web0", VMChange(labels={"n": str(number)}))
            else:
                client.vms.get("web0")
            return "done"
        except UndercroftError as error:
            return error.code

    found = await asyncio.gather(
        *(ask(world, lambda c, n=number: change(c, n)) for number in range(50))  # type: ignore[misc]
    )
    assert set(found) <= {"done", "stale", "conflict", "busy"}
    assert found.count("done") >= 25


async def test_a_reference_may_hold_anything(world: World) -> None:
    for ref in ("../../etc/passwd", "é", "a b", "%", "?x=1", "x" * 3000, "\x7f", "a\nb"):
        with pytest.raises((NotFoundError, InvalidError)):
            await ask(world, lambda c, ref=ref: c.vms.get(ref))  # type: ignore[misc]
    with pytest.raises(NotFoundError):
        await ask(world, lambda c: c.vms.get(new_id("vm")))


async def test_an_image_that_does_not_fit_is_refused(world: World) -> None:
    """A limit on the size of files stands for the full disk: the kernel answers alike."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, before[1]))
    try:
        content = (bytes(1 << 20) for _ in range(24))
        with pytest.raises(NoSpaceError, match="full"):
            await ask(world, lambda c: c.images.upload(content, name="large"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(world.host.tmp.iterdir()) == []
    assert (await world.operations.images.list(SYSTEM)).items == []


async def test_what_is_sent_is_not_held_in_memory(world: World) -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before, highest = resident(), 0

    def content() -> Iterator[bytes]:
        nonlocal highest
        piece = bytes(1 << 20)
        for _ in range(150):
            highest = max(highest, resident())
            yield piece

    await ask(world, lambda c: c.images.upload(content(), name="large"))
    (file,) = world.host.tmp.iterdir()
    assert file.stat().st_size == 150 << 20
    assert highest - before < 40 << 20
