"""Listing, showing, changing and switching VMs."""

import json
from typing import Any

import pytest

from tests.unit.cli.fake_api import page, problem, task, vm


def test_ls(croft, api):
    one = vm("web1", ports=[{"forwards": [{"host_port": 8080, "guest_port": 80}]}])
    one["status"]["addresses"] = ["10.0.2.15"]
    api.routes["GET", "/v1/vms"] = page(one, vm("db1", "stopped", image="img-gone"))
    api.routes["GET", "/v1/images"] = page({"meta": {"id": "img-1", "name": "debian:12"}})
    done = croft("ls")
    assert done.code == 0
    assert done.out.splitlines() == [
        "NAME  STATE    CPUS  MEMORY  IMAGE      ADDRESS    PORTS",
        "web1  running     2      1G  debian:12  10.0.2.15  8080→80",
        "db1   stopped     2      1G  img-gone   -          -",
    ]


def test_ls_asks_only_for_what_it_shows(croft, api):
    api.routes["GET", "/v1/vms"] = page(vm())
    croft("ls", "web*", "--state", "running", "-l", "env=prod", "--sort", "created", "-r")
    (call,) = api.sent("GET", "/v1/vms")
    assert "meta.name" in call.query["fields"]
    assert call.query["sort"] == "-meta.created"
    assert call.query["filter"] == "meta.name~web*,status.state==running,meta.labels.env==prod"


def test_ls_for_scripts(croft, api):
    api.routes["GET", "/v1/vms"] = page(vm("a"), vm("b"))
    assert croft("ls", "-q").out == "a\nb\n"
    assert json.loads(croft("ls", "--json").out) == [vm("a"), vm("b")]


def test_ls_of_nothing_says_how_to_begin(croft, api):
    api.routes["GET", "/v1/vms"] = page()
    done = croft("ls")
    assert (done.code, done.out) == (0, "")
    assert "croft run tiny" in done.err


def test_all_pages_are_read(croft, api):
    first, second = page(vm("a")), page(vm("b"))
    first["next"] = "cursor"
    api.routes["GET", "/v1/vms"] = lambda call: second if "cursor" in call.query else first
    assert croft("ls", "-q").out == "a\nb\n"


def test_show_one_field(croft, api):
    api.routes["GET", "/v1/vms/web1"] = vm()
    assert croft("show", "web1", "--field", "status.state").out == "running\n"
    assert croft("show", "web1", "--field", "status.instance.pid").out == "\n"


def test_show(croft, api):
    found = vm(disks=[{"volume": "vol-1", "bus": "virtio"}], firmware="bios", machine="q35")
    found["status"]["last_exit"] = {"reason": "guest-panic", "time": 1e9, "message": "oops\x1b[2J"}
    api.routes["GET", "/v1/vms/web1"] = found
    api.routes["GET", "/v1/images/img-1"] = {"meta": {"name": "debian:12"}}
    api.routes["GET", "/v1/volumes/vol-1"] = {
        "meta": {"name": "web1-boot"},
        "spec": {"size": 10 << 30},
        "status": {"allocated": 1 << 20},
    }
    out = croft("show", "web1").out
    for text in ("debian:12", "10G virtio", "1M of it in use", "bios boot", "guest-panic", "oops?"):
        assert text in out


def test_show_of_one_that_is_not_there_shows_the_others(croft, api):
    api.routes["GET", "/v1/vms"] = page(vm())
    api.routes["GET", "/v1/vms/web1"] = vm()
    done = croft("show", "nope", "web1")
    assert done.code == 3
    assert done.out.startswith("web1")
    assert "nope not found" in done.err


def test_set_sends_only_what_is_given(croft, api):
    api.routes["PATCH", "/v1/vms/web1"] = vm(cpus=4)
    done = croft("set", "web1", "--cpus", "4", "--memory", "2G")
    assert done.code == 0
    assert api.sent("PATCH", "/v1/vms/web1")[0].json == {"cpus": 4, "memory": 2 << 30}


def test_set_keeps_other_labels_and_the_way_to_ssh(croft, api):
    old = vm(ports=[{"forwards": [{"guest_port": 22, "host_port": 20022}, {"guest_port": 1}]}])
    old["meta"]["labels"] = {"a": "1", "b": "2"}
    api.routes["GET", "/v1/vms/web1"] = old
    api.routes["PATCH", "/v1/vms/web1"] = old
    croft("set", "web1", "--label", "a=", "--label", "c=3", "--publish", "8080:80")
    assert api.sent("PATCH", "/v1/vms/web1")[0].json == {
        "labels": {"b": "2", "c": "3"},
        "forwards": [
            {"guest_port": 80, "host_port": 8080},
            {"guest_port": 22, "host_port": 20022},
        ],
    }


def test_set_of_nothing_is_a_mistake(croft, api):
    assert croft("set", "web1").code == 2


@pytest.mark.parametrize(
    "verb", ["start", "stop", "restart", "reset", "pause", "resume", "suspend"]
)
def test_switching(croft, api, verb):
    api.routes["POST", f"/v1/vms/web1/{verb}"] = task(verb=f"vm.{verb}")
    done = croft(verb, "web1")
    assert done.code == 0
    assert done.out.startswith("web1 ")


def test_stop_says_how(croft, api):
    api.routes["POST", "/v1/vms/web1/stop"] = task(verb="vm.stop")
    croft("stop", "--force", "-t", "90s", "web1")
    (call,) = api.sent("POST", "/v1/vms/web1/stop")
    assert call.json == {"force": True, "timeout": 90.0}


def test_several_at_once_and_one_refusal(croft, api):
    """All are asked before any is waited for, and one that is refused stops none."""
    done_at = {}
    states = {"task-a": "running", "task-b": "running"}

    def look(id: str) -> Any:
        def answer(call):
            states[id] = "succeeded"
            done_at[id] = len(api.calls)
            return task(id, name=id[-1], state="succeeded")

        return answer

    api.routes["POST", "/v1/vms/a/start"] = task("task-a", name="a", state="running")
    api.routes["POST", "/v1/vms/b/start"] = task("task-b", name="b", state="running")
    api.routes["POST", "/v1/vms/c/start"] = problem(
        409, "wrong-state", "vm c is running, so it cannot be started", object="vm c"
    )
    api.routes["GET", "/v1/tasks/task-a"] = look("task-a")
    api.routes["GET", "/v1/tasks/task-b"] = look("task-b")
    done = croft("start", "a", "c", "b")
    assert done.code == 1
    assert [line.split()[0] for line in done.out.splitlines()] == ["a", "b"]
    assert "vm c is running, so it cannot be started (wrong-state)" in done.err
    methods = [call.method for call in api.calls]
    assert methods[:3] == ["POST"] * 3


def test_a_task_that_fails_tells_why(croft, api):
    error = {"title": "t", "status": 502, "code": "qemu-start", "detail": "QEMU did not start"}
    api.routes["POST", "/v1/vms/web1/start"] = task(state="failed", error=error)
    done = croft("start", "web1")
    assert done.code == 1
    assert "QEMU did not start (qemu-start)" in done.err


def test_no_wait_prints_the_task(croft, api):
    api.routes["POST", "/v1/vms/web1/start"] = task("task-7", state="pending")
    assert croft("start", "web1", "--no-wait").out == "task-7\n"
    assert not api.sent("GET", "/v1/tasks/task-7")


def test_rm(croft, api):
    api.routes["DELETE", "/v1/vms/web1"] = task(verb="vm.remove")
    assert croft("rm", "--force", "web1").out.startswith("web1 is removed")
    assert api.sent("DELETE", "/v1/vms/web1")[0].query == {"force": "true"}


def test_phases_are_told_where_there_is_no_terminal(croft, api):
    phases = iter(["making the disk", "starting"])

    def look(call):
        phase = next(phases, None)
        if phase is None:
            return task(state="succeeded")
        return task(state="running", phase=phase)

    api.routes["POST", "/v1/vms/web1/start"] = task(state="pending")
    api.routes["GET", "/v1/tasks/task-1"] = look
    assert croft("start", "web1").err.splitlines() == [
        "start web1: making the disk",
        "start web1: starting",
    ]
