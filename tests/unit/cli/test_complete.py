"""What the shells are told at TAB."""

import pytest

from tests.unit.cli.fake_api import page, task, vm


@pytest.fixture
def tab(croft):
    def press(*words: str) -> list[str]:
        done = croft("__complete", *words)
        assert (done.code, done.err) == (0, "")
        return [line.partition("\t")[0] for line in done.out.splitlines()]

    return press


@pytest.fixture
def vms(api):
    api.routes["GET", "/v1/vms"] = page(vm("web1"), vm("web2", "stopped"), vm("db1", "paused"))
    return api


def test_commands(tab):
    found = tab("")
    assert {"run", "ls", "image", "token"} <= set(found)
    assert "image ls" not in found
    assert tab("st") == ["start", "stop"]
    assert tab("image", "") == ["build", "catalogue", "import", "ls", "rm", "show"]
    assert tab("image", "b") == ["build"]


def test_options(tab):
    assert tab("stop", "--f") == ["--force"]
    assert {"--json", "--data", "--publish"} <= set(tab("run", "--"))
    assert "--json" in tab("--j")


def test_values_of_options(tab):
    assert tab("run", "--network", "") == ["none", "restricted", "user"]
    assert tab("run", "--network", "r") == ["restricted"]
    assert tab("run", "--user-data", "x") == [":files"]
    assert tab("run", "--name", "") == []
    assert tab("--data", "x") == [":files"]


def test_vms_that_fit_the_command(tab, vms):
    assert tab("start", "") == ["web2"]
    assert tab("stop", "") == ["db1", "web1"]
    assert tab("resume", "") == ["db1"]
    assert tab("rm", "w") == ["web1", "web2"]
    assert tab("rm", "web1", "") == ["db1", "web2"]
    assert tab("rm", "--force", "web1", "w") == ["web2"]
    assert tab("console", "web1", "") == []


def test_a_program_in_a_guest_is_not_ours_to_complete(tab, vms):
    assert tab("exec", "web1", "--", "l") == []
    assert tab("exec", "web1", "") == []


def test_images_and_what_can_be_had(tab, api):
    api.routes["GET", "/v1/images"] = page({"meta": {"name": "mine"}, "status": {"state": "ready"}})
    api.routes["GET", "/v1/catalogue"] = page({"name": "fedora:42"})
    assert tab("run", "") == ["debian:12", "fedora:42", "mine", "tiny"]
    assert tab("image", "rm", "") == ["mine"]


def test_tasks(tab, api):
    api.routes["GET", "/v1/tasks"] = page(task("task-1"), task("task-2", state="running"))
    assert tab("task", "wait", "") == ["task-2"]
    assert tab("task", "show", "") == ["task-1", "task-2"]


def test_files(tab, vms):
    assert ":files" in tab("image", "import", "")
    assert tab("cdrom", "insert", "web1", "") == [":files"]
    assert tab("cdrom", "insert", "w") == ["web1", "web2"]
    assert tab("run", "--cdrom", "") == [":files"]
    assert set(tab("cp", "")) == {":files", "web1:/"}


def test_no_daemon_is_started_for_it(tab, data):
    assert tab("start", "") == []
    assert list(data.iterdir()) == []


def test_nonsense_is_no_error(tab, api):
    api.routes["GET", "/v1/vms"] = {"what": "?"}
    assert tab("start", "") == []
    assert tab("nonsense", "") == []
    assert tab() != []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(croft, shell):
    done = croft("completion", shell)
    assert done.code == 0
    assert "__complete" in done.out
