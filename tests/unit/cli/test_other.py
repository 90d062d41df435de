"""Images, volumes, tasks, events, the host, tokens, the daemon and top."""

import json
from pathlib import Path

import pytest

from tests.unit.cli.fake_api import page, problem, task
from undercroft.cli import top


def image(name: str, state: str = "ready") -> dict[str, object]:
    return {
        "meta": {"id": f"img-{name}", "name": name, "created": 1e9},
        "spec": {"source": "build", "value": name},
        "status": {"state": state, "size": 23 << 20, "content": {"os": "debian 12", "arch": "x"}},
    }


def test_image_ls(croft, api):
    api.routes["GET", "/v1/images"] = page(image("debian:12"))
    done = croft("image", "ls")
    assert "debian:12  ready  debian 12" in done.out
    assert croft("images", "-q").out == "debian:12\n"


def test_image_build(croft, api):
    api.routes["POST", "/v1/images"] = task(verb="image.create", name="tiny")
    api.routes["GET", "/v1/images/vm-tiny"] = image("tiny")
    done = croft("image", "build", "tiny", "--replace")
    assert done.code == 0
    assert done.out.startswith("tiny is ready (debian 12, 23M)")
    assert api.sent("POST", "/v1/images")[0].json == {
        "source": "build",
        "value": "tiny",
        "replace": True,
    }


@pytest.fixture
def importing(api):
    made = task(verb="image.create", name="mine")
    api.routes["POST", "/v1/images"] = api.routes["POST", "/v1/images/upload"] = made
    api.routes["GET", "/v1/images/vm-mine"] = image("mine")
    api.routes["GET", "/v1/catalogue"] = page({"name": "fedora:42", "title": "Fedora 42"})
    return api


def test_import_of_a_file_sends_it(croft, importing, tmp_path: Path):
    path = tmp_path / "My Disk.QCOW2"
    path.write_bytes(b"x" * 3_000_000)
    assert croft("image", "import", str(path), "--sha256", "ab", "--firmware", "uefi").code == 0
    (call,) = importing.sent("POST", "/v1/images/upload")
    assert call.query == {"name": "my-disk", "sha256": "ab", "firmware": "uefi"}
    assert call.body == b"x" * 3_000_000


def test_import_from_an_address_and_from_the_catalogue(croft, importing):
    assert croft("image", "import", "https://example.org/d.raw", "--format", "raw").code == 0
    assert croft("image", "import", "fedora:42").code == 0
    one, two = (call.json for call in importing.sent("POST", "/v1/images"))
    assert one == {"source": "url", "value": "https://example.org/d.raw", "format": "raw"}
    assert two == {"source": "catalogue", "value": "fedora:42"}


def test_import_of_nothing(croft, importing):
    assert croft("image", "import", "nowhere.qcow2").code == 2
    assert croft("image", "import", "-").code == 2


def test_catalogue(croft, importing):
    out = croft("image", "catalogue").out
    assert "fedora:42  fetch  Fedora 42" in out
    assert "tiny       build" in out


def test_volumes(croft, api):
    volume = {
        "meta": {"id": "vol-1", "name": "web1-boot", "created": 1e9},
        "spec": {"size": 10 << 30, "vm": "vm-1", "image": "img-1"},
        "status": {"state": "ready", "allocated": 1 << 20, "datastore": "ds-1"},
    }
    api.routes["GET", "/v1/volumes"] = page(volume)
    api.routes["GET", "/v1/vms"] = page({"meta": {"id": "vm-1", "name": "web1"}})
    api.routes["GET", "/v1/datastores"] = page({"meta": {"id": "ds-1", "name": "fast"}})
    assert "web1-boot  ready   10G       1M  web1  img-1  fast" in croft("volume", "ls").out


def test_datastores(croft, api, monkeypatch):
    datastore = {
        "meta": {"id": "ds-1", "name": "fast", "created": 1e9},
        "spec": {"path": "/srv/fast", "default": True, "warning": 0.7},
        "status": {
            "state": "ready",
            "capacity": 10 << 30,
            "free": 1 << 30,
            "used": 2 << 30,
            "provisioned": 25 << 30,
            "fill": "warning",
            "message": "datastore fast is 90% full",
        },
    }
    api.routes["GET", "/v1/datastores"] = page(datastore)
    shown = croft("datastore", "ls")
    assert "fast *  ready       10G   90%    1G    2G       25G  2.50  /srv/fast" in shown.out
    assert "datastore fast is 90% full" in shown.err
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "  \x1b[33m90%\x1b[0m  " in croft("datastore", "ls").out
    monkeypatch.delenv("FORCE_COLOR")
    api.routes["GET", "/v1/datastores/fast"] = datastore
    text = croft("datastore", "show", "fast").out
    assert "25G (2.50 times the capacity)" in text
    assert "70% and 95%" in text


def test_what_a_datastore_is_told(croft, api):
    made = {"meta": {"name": "fast"}, "status": {"free": 1 << 30}}
    api.routes["POST", "/v1/datastores"] = api.routes["PATCH", "/v1/datastores/fast"] = made
    path = ["--path", "/srv/fast", "--warning", "70%"]
    done = croft("datastore", "create", "fast", *path, "--default")
    assert (done.code, done.out) == (0, "datastore fast is there: /srv/fast (1G free)\n")
    assert api.sent("POST", "/v1/datastores")[0].json == {
        "name": "fast",
        "path": "/srv/fast",
        "warning": 0.7,
        "default": True,
    }
    assert croft("datastore", "set", "fast", "--critical", "0.9").code == 0
    assert api.sent("PATCH", "/v1/datastores/fast")[0].json == {"critical": 0.9}
    assert croft("datastore", "set", "fast").code == 2
    assert croft("datastore", "create", "x", "--path", "/x", "--warning", "120%").code == 2


def test_tasks(croft, api):
    running = task("task-2", state="running", progress=0.5, phase="copying")
    api.routes["GET", "/v1/tasks"] = page(task("task-1"), running)
    out = croft("task", "ls").out
    assert "task-1  start web1  succeeded" in out
    assert "50%" in out
    assert "task-1" not in croft("task", "ls", "--running").out
    assert croft("task", "ls", "-q", "-n", "1").out == "task-2\n"
    api.routes["GET", "/v1/tasks/task-2"] = running
    assert "copying" in croft("task", "show", "task-2").out


def test_waiting_for_a_task_that_fails(croft, api):
    error = {"title": "t", "status": 507, "code": "no-space", "detail": "the disk is full"}
    api.routes["GET", "/v1/tasks/task-1"] = task(state="failed", error=error)
    done = croft("task", "wait", "task-1")
    assert done.code == 1
    assert "the disk is full (no-space)" in done.err


def test_cancelling(croft, api):
    api.routes["POST", "/v1/tasks/task-1/cancel"] = task(state="running")
    api.routes["GET", "/v1/tasks/task-1"] = task(state="cancelled")
    done = croft("task", "cancel", "task-1")
    assert (done.code, done.out) == (0, "start web1 is cancelled\n")


def event(message: str, name: str = "web1", level: str = "info") -> dict[str, object]:
    return {
        "meta": {"id": "ev-1", "name": "ev-1", "created": 1e9},
        "type": "vm.started",
        "object": {"kind": "vm", "id": "vm-1", "name": name},
        "level": level,
        "message": message,
        "by": "root",
    }


def test_events(croft, api):
    api.routes["GET", "/v1/events"] = page(event("vm web1 was started\x1b[2J"))
    out = croft("events", "-n", "5", "web1").out
    assert "vm.started" in out
    assert "\x1b" not in out
    assert api.sent("GET", "/v1/events")[0].query == {"limit": "5", "object": "web1"}


def test_following_events(croft, api):
    api.routes["GET", "/v1/events"] = page(event("first"), revision=7)
    lines = [f"id: 8\ndata: {json.dumps(event(text, name))}\n\n" for text, name in (
        ("second", "web1"), ("of another", "web2"), ("third", "web1"),
    )]  # fmt: skip
    begin = "id: 7\nevent: start\ndata: {}\n\n"
    answers = iter([(begin + "".join(lines)).encode()])
    gone = problem(410, "compacted", "history is gone")
    api.routes["GET", "/v1/events/stream"] = lambda call: next(answers, gone)
    done = croft("events", "--follow", "web1")
    assert done.code == 1  # the stand-in ends the stream by an error
    assert [line.split()[-2] for line in done.out.splitlines()] == ["first", "second", "third"]
    assert api.sent("GET", "/v1/events/stream")[0].query["after"] == "7"


def test_following_into_an_error(croft, api):
    api.routes["GET", "/v1/events"] = page(revision=7)
    text = json.dumps(problem(410, "compacted", "history is gone")[1])
    api.routes["GET", "/v1/events/stream"] = f"event: error\ndata: {text}\n\n".encode()
    done = croft("events", "--follow")
    assert done.code == 1
    assert "history is gone (compacted)" in done.err


def test_host(croft, api):
    status = {
        "hostname": "box",
        "cpus": 2,
        "accelerators": [{"name": "kvm", "available": False, "reason": "it hangs"}],
        "problems": ["no KVM"],
    }
    api.routes["GET", "/v1/hosts/self"] = {"meta": {"id": "host-1"}, "status": status}
    out = croft("host", "show").out
    assert "kvm: no, it hangs" in out
    assert "no KVM" in out


@pytest.mark.parametrize(("repaired", "code"), [(False, 1), (True, 0)])
def test_check(croft, api, repaired, code):
    finding = {"code": "orphan-file", "message": "a file of no volume", "repaired": repaired}
    report = {"findings": [finding], "checked": {"vms": 1, "volumes": 2}}
    api.routes["POST", "/v1/hosts/self/check"] = report
    done = croft("host", "check", *(["--repair"] if repaired else []))
    assert done.code == code
    assert "a file of no volume (orphan-file)" in done.out


def test_check_of_a_clean_host(croft, api):
    report = {"findings": [], "checked": {"vms": 1, "volumes": 2}}
    api.routes["POST", "/v1/hosts/self/check"] = report
    assert croft("host", "check").out == "all is in order (1 vm, 2 volumes checked)\n"


def test_tokens(croft, data):
    made = json.loads(croft("token", "create", "lap", "-p", "vm.view", "--json").out)
    assert made["token"].startswith("croft_")
    assert len(made["fingerprint"]) == 64
    assert "lap   vm.view" in croft("token", "ls").out
    assert made["token"] not in (data / "tokens.json").read_text()
    assert croft("token", "create", "lap").code == 1
    assert croft("token", "rm", "lap").code == 0
    assert croft("token", "rm", "lap").code == 3


def test_no_daemon(croft, data):
    done = croft("daemon", "status")
    assert done.code == 4
    assert "no daemon runs" in done.out
    assert croft("daemon", "stop").code == 0
    assert list(data.iterdir()) == []
    assert "no daemon answers" in croft("version").out


def test_a_daemon(croft, api):
    api.routes["GET", "/v1"] = {"pid": 7, "version": "9.9", "api": "v1", "data": "/d"}
    api.routes["GET", "/v1/vms"] = page(
        {"status": {"state": "running"}}, {"status": {"state": "x"}}
    )
    out = croft("daemon", "status").out
    assert "pid 7" in out
    assert "2 VMs, 1 of them running" in out
    assert "daemon 9.9" in croft("version").out


@pytest.mark.parametrize("what", ["run", "stop", "restart"])
def test_a_daemon_elsewhere_is_not_ours_to_run(croft, what):
    assert croft("daemon", what, "--url", "https://example.org").code == 2


METRICS = """# HELP x y
undercroft_vms{state="running"} 2
undercroft_vm_cpu_seconds_total{vm="web1",id="vm-1"} %s
undercroft_vm_memory_bytes{vm="web1",id="vm-1"} 1048576
undercroft_vm_disk_read_bytes_total{vm="web1",id="vm-1"} %s
"""


def test_usage_is_what_happened_in_between():
    before = top.Measurement(10.0, top.parse(METRICS % ("5.5", "1000")))
    now = top.Measurement(12.0, top.parse(METRICS % ("6.5", "5000")))
    (row,) = top.usage(before, now, "cpu")
    assert row == {
        "vm": "vm-1",
        "name": "web1",
        "memory": 1 << 20,
        "cpu": 0.5,
        "read": 2000,
        "written": 0,
        "received": 0,
        "sent": 0,
    }


def test_a_counter_that_began_anew():
    before = top.Measurement(0.0, top.parse(METRICS % ("100", "0")))
    now = top.Measurement(2.0, top.parse(METRICS % ("1", "0")))
    assert top.usage(before, now, "name")[0]["cpu"] == 0.5
    fresh = top.usage(top.Measurement(0.0, {}), now, "name")
    assert fresh[0]["cpu"] == 0.0


def test_top_once(croft, api, monkeypatch):
    api.routes["GET", "/v1/hosts/self"] = {"status": {}}
    api.routes["GET", "/metrics"] = (METRICS % ("1", "0")).encode()
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert "web1" in croft("top").out
    assert json.loads(croft("top", "--json").out)[0]["name"] == "web1"


def test_encryption_is_asked_for(croft, api):
    wanted = {"name": "safe", "size": 1 << 30, "encrypt": True}
    api.routes["POST", "/v1/volumes"] = api.routes["POST", "/v1/volumes/safe/clone"] = task()
    assert croft("volume", "create", "safe", "-s", "1G", "--encrypt", "--no-wait").code == 0
    assert api.sent("POST", "/v1/volumes")[0].json == wanted
    assert croft("volume", "clone", "safe", "open", "--full", "--decrypt", "--no-wait").code == 0
    assert api.sent("POST", "/v1/volumes/safe/clone")[0].json["encrypted"] is False
    assert croft("volume", "clone", "safe", "x", "--encrypt", "--decrypt").code == 2


def test_a_volume_has_a_size_afterwards(croft, api):
    made = task(verb="volume.resize", name="data1")
    object = {"kind": "volume", "id": "vol-1", "name": "data1"}
    made["spec"] = {**made["spec"], "object": object, "arguments": {"size": 3 << 30}}
    api.routes["POST", "/v1/volumes/data1/resize"] = made
    assert "data1 has 3G" in croft("volume", "resize", "data1", "+1G").out
