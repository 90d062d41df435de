"""Programs and files in guests, and waiting for one that is booting."""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import undercroft
from tests.unit.cli.fake_api import problem, vm
from undercroft.cli import patience


def result(code: int | None = 0, out: bytes = b"", err: bytes = b"", **more: object) -> object:
    texts = {"stdout": base64.b64encode(out).decode(), "stderr": base64.b64encode(err).decode()}
    return {"exit_code": code, "signal": None, **texts, **more}


NO_AGENT = problem(502, "guest-agent", "no guest agent runs in vm web1", object="vm web1")
EXEC = ("POST", "/v1/vms/web1/exec")


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        (["web1", "--", "uname", "-a"], ["uname", "-a"]),
        (["web1", "uname", "-a"], ["uname", "-a"]),
        (["web1", "--", "sh", "-c", "a --help --json"], ["sh", "-c", "a --help --json"]),
        (["web1", "ls", "--", "-x"], ["ls", "--", "-x"]),
        (["web1", "-e", "A=1", "--", "env", "-e"], ["env", "-e"]),
        (["web1", "ls", "-e"], ["ls", "-e"]),
        (["web1", "--", "--", "x"], ["--", "x"]),
    ],
)
def test_the_program_is_passed_on_as_it_is(croft, api, words, argv):
    api.routes[EXEC] = result()
    assert croft("exec", "-n", *words).code == 0
    assert api.sent(*EXEC)[0].json["argv"] == argv


def test_output_and_exit_code_are_its_own(croft, api):
    api.routes[EXEC] = result(7, b"out\xff", b"err")
    done = croft("exec", "-n", "web1", "--", "x")
    assert (done.code, done.err) == (7, "err")
    assert done.out.startswith("out")


def test_environment_and_time_limit(croft, api):
    api.routes[EXEC] = result()
    croft("exec", "-n", "-e", "A=1", "--env", "B=x=y", "-t", "2m", "web1", "--", "x")
    request = api.sent(*EXEC)[0].json
    assert request["env"] == {"A": "1", "B": "x=y"}
    assert request["timeout"] == 120.0


@pytest.mark.parametrize(("words", "expected"), [([], b"\x00data"), (["-n"], None)])
def test_input_from_a_pipe(api, words, expected):
    api.routes[EXEC] = result(3)
    command = [sys.executable, "-m", "undercroft.cli", "exec", *words, "web1", "--", "cat"]
    source = {**os.environ, "PYTHONPATH": str(Path(undercroft.__file__).parents[1])}
    done = subprocess.run(command, input=b"\x00data", env=source)
    assert done.returncode == 3
    sent = api.sent(*EXEC)[0].json.get("input")
    assert (None if sent is None else base64.b64decode(sent)) == expected


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (result(None, signal=9), 137),
        (NO_AGENT, 125),
        (problem(404, "not-found", "vm web1 not found", object="vm web1"), 125),
        (problem(502, "no-program", "there is no program x in vm web1"), 127),
        (problem(502, "no-program", "x in vm web1 cannot be run: Permission denied"), 126),
    ],
)
def test_exit_codes_of_failures(croft, api, answer, code):
    api.routes[EXEC] = answer
    assert croft("exec", "-n", "--wait", "0", "web1", "--", "x").code == code


def test_without_a_program(croft, api):
    assert croft("exec").code == 2
    assert croft("exec", "--", "ls").code == 2
    assert croft("exec", "web1").code == 2
    assert croft("exec", "web1", "--").code == 2


def test_a_guest_that_is_booting_is_waited_for(croft, api, monkeypatch):
    monkeypatch.setattr(patience, "_STEP", 0.0)
    booting = vm(image="img-1")
    booting["status"] |= {"agent": None, "instance": {"started": time.time()}}
    api.routes["GET", "/v1/vms/web1"] = booting
    api.routes["GET", "/v1/images/img-1"] = {"status": {"content": {"agent": True}}}
    answers = iter([NO_AGENT, NO_AGENT, result(0, b"hello")])
    api.routes[EXEC] = lambda call: next(answers)
    done = croft("exec", "-n", "web1", "--", "hostname")
    assert (done.code, done.out) == (0, "hello")
    assert done.err.count("waiting for the guest agent") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"agent": True},  # it answers, but refused
        {"instance": {"started": 1e9}},  # it has had its time
        {"instance": None},
    ],
)
def test_one_that_is_not_booting_is_not(croft, api, change):
    found = vm(image="img-1")
    found["status"] |= {"agent": None, "instance": {"started": time.time()}, **change}
    api.routes["GET", "/v1/vms/web1"] = found
    api.routes["GET", "/v1/images/img-1"] = {"status": {"content": {"agent": True}}}
    api.routes[EXEC] = NO_AGENT
    assert croft("exec", "-n", "web1", "--", "x").code == 125
    assert len(api.sent(*EXEC)) == 1


FILES = "/v1/vms/web1/files"


def test_a_file_out_of_a_guest(croft, api, tmp_path: Path):
    api.routes["GET", FILES] = b"content\x00"
    target = tmp_path / "hosts"
    target.write_text("old")
    assert croft("cp", "web1:/etc/hosts", str(tmp_path)).code == 0
    assert target.read_bytes() == b"content\x00"
    assert api.sent("GET", FILES)[0].query == {"path": "/etc/hosts"}
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]


def test_a_file_that_cannot_be_had_leaves_the_old_one(croft, api, tmp_path: Path):
    api.routes["GET", FILES] = problem(502, "guest-agent", "no such file")
    api.routes["GET", "/v1/vms/web1"] = vm()
    (tmp_path / "x").write_text("old")
    assert croft("cp", "web1:/x", f"{tmp_path}/x").code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_to_a_pipe(croft, api):
    api.routes["GET", FILES] = b"content"
    assert croft("cp", "web1:/etc/hosts", "-").out == "content"


def test_files_into_a_guest(croft, api, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 3)
    (tmp_path / "a").chmod(0o750)
    api.routes["PUT", FILES] = lambda call: {"size": len(call.body)}
    done = croft("cp", f"{tmp_path}/a", f"{tmp_path}/b", "web1:/srv", "--json")
    assert done.code == 0
    calls = api.sent("PUT", FILES)
    assert [call.query["path"] for call in calls] == ["/srv/a", "/srv/b"]
    assert [call.body for call in calls] == [b"aaa", b"bbb"]
    assert calls[0].query["mode"] == "0750"
    assert [one["size"] for one in json.loads(done.out)] == [3, 3]


def test_a_target_that_turns_out_to_be_a_directory(croft, api, tmp_path: Path):
    (tmp_path / "a").write_text("x")
    api.routes["GET", "/v1/vms/web1"] = vm()
    api.routes["PUT", FILES] = lambda call: (
        {"size": 1}
        if call.query["path"] == "/tmp/a"
        else problem(502, "guest-agent", "Is a directory")
    )
    api.routes[EXEC] = result(0)
    done = croft("cp", f"{tmp_path}/a", "web1:/tmp")
    assert done.code == 0
    assert done.out.startswith("web1:/tmp/a: 1B")


@pytest.mark.parametrize(
    "words",
    [
        ["a"],
        ["a", "b"],
        ["web1:/a", "web2:/b"],
        ["web1:a", "."],
        ["web1:/a", "web1:/b", "not-a-directory"],
    ],
)
def test_copies_that_make_no_sense(croft, api, words):
    assert croft("cp", *words).code == 2


def test_a_directory_is_not_copied(croft, api, tmp_path: Path):
    done = croft("cp", str(tmp_path), "web1:/srv")
    assert done.code == 2
    assert "tar" in done.err


def test_log(croft, api):
    api.routes["GET", "/v1/vms/web1/log"] = b"one\r\n\x1b[1mtwo\x1b[0m\r\nthree"
    assert croft("log", "web1").out == "one\ntwo\nthree\n"
    assert croft("log", "web1", "-n", "1").out == "three\n"
    assert croft("log", "web1", "-n", "2").out == "two\nthree\n"
    assert "\x1b[1m" in croft("log", "web1", "--raw").out


def test_screenshot(croft, api, tmp_path: Path):
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (720).to_bytes(4, "big") + (400).to_bytes(4, "big")
    api.routes["GET", "/v1/vms/web1/screenshot"] = header
    assert croft("screenshot", "web1", f"{tmp_path}/s.png").out.endswith("720×400\n")
    assert (tmp_path / "s.png").read_bytes() == header
