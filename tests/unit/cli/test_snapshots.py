"""``croft snapshot``."""

from typing import Any

from tests.unit.cli.fake_api import page, task


def snapshot(name: str, parent: str | None = None, **status: object) -> dict[str, object]:
    return {
        "meta": {"id": f"snap-{name}", "name": name, "created": 1e9},
        "spec": {"vm": "vm-web1", "description": "all is well" if name == "two" else ""},
        "status": {"state": "ready", "parent": parent and f"snap-{parent}", "memory": 0, **status},
    }


def prepare(api: Any, now: str | None = "snap-three") -> None:
    api.routes["GET", "/v1/vms/web1/snapshots"] = page(
        snapshot("one"), snapshot("two", "one", memory=1 << 20), snapshot("three", "one")
    )
    api.routes["GET", "/v1/vms/web1"] = {"meta": {"name": "web1"}, "status": {"snapshot": now}}


def test_ls(croft, api):
    prepare(api)
    lines = croft("snapshot", "ls", "web1").out.splitlines()
    assert lines[0].split() == ["NAME", "FROM", "STATE", "MEMORY", "AGE", "DESCRIPTION"]
    assert lines[2].startswith("two")
    assert "1M" in lines[2]
    assert "all is well" in lines[2]
    assert lines[3].startswith("three *  one")
    assert croft("snapshots", "web1", "-q").out.split() == ["one", "two", "three"]


def test_the_tree(croft, api):
    prepare(api)
    assert croft("snapshot", "ls", "web1", "--tree").out.splitlines() == [
        "└─ one",
        "   ├─ two",
        "   └─ three",
        "      └─ (now)",
    ]
    prepare(api, now=None)
    assert croft("snapshot", "ls", "web1", "--tree").out.splitlines()[-1] == "└─ (now)"


def test_create_revert_and_rm(croft, api):
    made = task(verb="snapshot.create", name="web1")
    made["spec"]["arguments"] = {"name": "snap1"}
    api.routes["POST", "/v1/vms/web1/snapshots"] = made
    api.routes["POST", "/v1/vms/web1/snapshots/snap1/revert"] = made
    api.routes["DELETE", "/v1/vms/web1/snapshots/snap1"] = made
    done = croft("snapshot", "create", "web1", "--memory", "-d", "x")
    assert done.out.startswith("web1 is kept in snapshot snap1")
    (call,) = api.sent("POST", "/v1/vms/web1/snapshots")
    assert call.json == {"memory": True, "quiesce": False, "description": "x"}
    done = croft("snapshot", "revert", "--force", "web1", "snap1")
    assert done.out.startswith("web1 is as it was in snap1")
    (call,) = api.sent("POST", "/v1/vms/web1/snapshots/snap1/revert")
    assert call.json == {"force": True, "start": False}
    done = croft("snapshot", "rm", "web1", "snap1")
    assert done.out.startswith("web1 no longer has snapshot snap1")


def test_none_yet(croft, api):
    prepare(api)
    api.routes["GET", "/v1/vms/web1/snapshots"] = page()
    done = croft("snapshot", "ls", "web1")
    assert (done.code, done.out) == (0, "")
    assert "croft snapshot create web1" in done.err
