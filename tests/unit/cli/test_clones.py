"""Clones: what is asked, waited for and told."""

from typing import Any

import pytest

from tests.unit.cli.fake_api import page, task, vm


def _tasks(count: int) -> list[dict[str, Any]]:
    return [task(f"task-{n}", "vm.create", f"web1-{n}", "running") for n in range(count)]


def test_the_daemon_is_not_asked_more_often_the_more_clones_there_are(croft, api):
    """Whoever waits for many asks for each once it is its turn, not for all at every turn."""
    tasks = _tasks(30)
    api.routes["POST", "/v1/vms/web1/clone"] = {"tasks": tasks}
    for one in tasks:
        name = one["spec"]["object"]["name"]
        done = task(one["meta"]["id"], "vm.create", name, result={"pid": 1})
        answers = iter([one, done])
        api.routes["GET", f"/v1/tasks/{one['meta']['id']}"] = lambda call, a=answers: next(a)
    done = croft("clone", "web1", "--instant", "--count", "30")
    assert done.code == 0
    assert len(done.out.splitlines()) == 30
    assert len([call for call in api.calls if call.method == "GET"]) == 60


def test_what_a_clone_still_shares_is_told_by_its_task(croft, api):
    result = {"shares": ["hostname", "machine-id"]}
    api.routes["POST", "/v1/vms/web1/clone"] = {
        "tasks": [task("task-1", "vm.create", "web2", result=result)]
    }
    done = croft("clone", "web1", "web2", "--instant")
    assert "web2 still shares with its source: hostname, machine-id" in done.err


ERROR = {"type": "x", "title": "t", "status": 507, "code": "no-space", "detail": "no memory"}


@pytest.mark.parametrize(
    ("words", "state", "told"),
    [
        (["--start"], "stopped", True),
        (["--start"], "failed", False),
        ([], "stopped", False),
    ],
)
def test_a_clone_that_does_not_start_is_there_all_the_same(croft, api, words, state, told):
    failed = task("task-1", "vm.create", "web2", "failed", error=ERROR)
    api.routes["POST", "/v1/vms/web1/clone"] = {"tasks": [failed]}
    api.routes["GET", "/v1/vms/vm-web2"] = vm("web2", state)
    done = croft("clone", "web1", "web2", *words)
    assert (done.code, "no memory" in done.err) == (1, True)
    assert ("vm web2 is there, switched off" in done.err) == told


def test_a_source_that_is_neither_vm_nor_template(croft, api):
    api.routes["GET", "/v1/vms"] = page(vm("web1"))
    api.routes["GET", "/v1/templates"] = page({"meta": {"name": "tl:v1"}})
    done = croft("clone", "tl", "l2")
    assert done.code == 3
    assert "there is no VM or template tl (not-found)" in done.err
    assert "did you mean tl:v1?" in done.err
