"""Finding commands, reading options, explaining mistakes."""

import json
import re

import pytest

from tests.unit.cli.fake_api import page, problem, vm
from undercroft import __version__
from undercroft.cli.hints import ELSEWHERE, OPTIONS
from undercroft.cli.registry import ALIASES, COMMANDS, NOUNS, THEMES


def test_the_tour_names_what_a_new_user_needs(croft):
    done = croft()
    assert done.code == 0
    for words in ("run", "ls", "console", "image build", "events", "daemon"):
        assert words in done.out


@pytest.mark.parametrize("words", ["--version", "-V"])
def test_version(croft, words):
    assert croft(words) == (0, f"croft {__version__}\n", "")


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_every_command_explains_itself(croft, words):
    done = croft("help", *words.split())
    assert done.code == 0
    assert done.out.startswith(COMMANDS[words][2])
    assert "Usage" in done.out
    assert "Examples" in done.out
    assert all(len(line) <= 110 for line in done.out.splitlines())
    assert croft(*words.split(), "--help").out == done.out


def test_every_name_that_is_mentioned_exists():
    assert {words for _, commands in THEMES for words in commands} <= set(COMMANDS)
    assert set(ALIASES.values()) <= set(COMMANDS)
    assert not set(ELSEWHERE) & (set(COMMANDS) | set(NOUNS) | set(ALIASES))
    assert {words.split()[0] for words in COMMANDS if " " in words} == set(NOUNS)
    assert set(OPTIONS) <= set(COMMANDS)
    hints = [*ELSEWHERE.values(), *(h for options in OPTIONS.values() for h in options.values())]
    for said in re.findall(r"croft ((?:[a-z]+ ?)+)", " ".join(hints)):
        one, two = said.split()[0], " ".join(said.split()[:2])
        assert {one, two} & set(COMMANDS), said


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["lss"], "did you mean: croft ls"),
        (["image", "bild"], "did you mean: croft image build"),
        (["destroy", "web1"], "croft stop --force"),
        (["frobnicate"], "croft help"),
        (["volume", "delete", "x"], "→ croft volume rm\n"),
        (["volume", "frob"], "there are: "),
        (["snapshot", "delete", "web1", "s"], "→ croft snapshot rm\n"),
        (["snapshot", "rollback", "web1"], "→ croft snapshot revert\n"),
        (["backup", "rollback", "b"], "→ croft backup restore\n"),
        (["volume", "rename", "a", "b"], "a volume keeps its name"),
        (["volume", "move", "a"], "--datastore DATASTORE, then croft volume rm"),
        (["disk", "ls"], "→ croft volume ls\n"),
        (["disk", "delete", "a"], "→ croft volume rm\n"),
        (["disk"], "→ croft volume\n"),
        (["help", "disk"], "→ croft volume\n"),
        (["iso", "ls"], "croft cdrom insert"),
        (["vm", "list"], "→ croft ls\n"),
        (["vm", "destroy"], "croft stop --force"),
        (["qm"], "→ croft help\n"),
        (["qm", "list"], "→ croft ls\n"),
        (["virsh", "destroy", "web1"], "croft stop --force"),
        (["qm", "resize"], "croft volume resize"),
        (["set", "d1", "--disk", "5G"], "croft volume attach NAME VM"),
        (["run", "--cpu", "2"], "did you mean --cpus"),
        (["start"], "croft start --help"),
        (["ls", "--sort"], "croft ls --help"),
        (["run", "tiny", "--memory", "much"], "croft run --help"),
        (["--frob"], "croft help"),
    ],
)
def test_a_wrong_call_is_explained(croft, words, hint):
    done = croft(*words)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("croft: ")
    assert hint in done.err


def test_a_wrong_call_as_json(croft):
    done = croft("--json", "lss")
    assert done.code == 2
    assert json.loads(done.err)["code"] == "usage"


@pytest.mark.parametrize(
    "words", [["--json", "show", "web1"], ["show", "--json", "web1"], ["show", "web1", "--json"]]
)
def test_options_for_all_stand_anywhere(croft, api, words):
    api.routes["GET", "/v1/vms/web1"] = vm()
    done = croft(*words)
    assert done.code == 0
    assert json.loads(done.out) == vm()


def test_an_unknown_vm(croft, api):
    api.routes["GET", "/v1/vms"] = page(vm("web1"), vm("db1"))
    done = croft("show", "web9")
    assert done.code == 3
    assert "croft: vm web9 not found (not-found)" in done.err
    assert "did you mean web1?" in done.err


def test_an_error_as_json_is_the_problem_itself(croft, api):
    api.routes["GET", "/v1/vms/web9"] = problem(404, "not-found", "vm web9 not found")
    done = croft("show", "web9", "--json")
    assert done.code == 3
    assert json.loads(done.err)["type"] == "urn:undercroft:error:not-found"


def test_no_daemon_elsewhere_is_never_started(croft, data):
    done = croft("--url", f"unix:{data}/none.sock", "ls")
    assert done.code == 4
    assert "no daemon answers" in done.err
    assert not (data / "start.lock").exists()


def test_what_a_server_says_cannot_touch_the_terminal(croft, api):
    api.routes["GET", "/v1/vms/web1"] = problem(409, "conflict", "bad\x1b]0;x\x07\nthing")
    done = croft("show", "web1")
    assert "\x1b" not in done.err
    assert "\x07" not in done.err


def test_a_fault_of_ours_is_no_traceback(croft, api):
    api.routes["GET", "/v1/vms"] = {"nonsense": 1}
    done = croft("ls")
    assert done.code == 1
    assert "(internal)" in done.err or "fault of croft's own" in done.err
    assert "Traceback" not in done.err
