"""Ctrl-C while a task is waited for: single keys, and an end that comes before any."""

import os
import select
import sys
import termios
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.cli.fake_api import FakeApi, task
from undercroft.cli import progress
from undercroft.cli.output import Style


class Terminal:
    """A user's terminal: what croft writes is read here, and the keys are ours."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        self.slave = os.fdopen(slave, "r+b", buffering=0)

    def modes(self) -> Any:
        return termios.tcgetattr(self.slave)

    def text(self) -> str:
        text = b""
        while select.select([self.master], [], [], 0.05)[0]:
            text += os.read(self.master, 1 << 16)
        return text.decode()

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    found = Terminal()
    yield found
    found.slave.close()
    os.close(found.master)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch, api: FakeApi, terminal: Terminal) -> Any:
    """``croft start`` that is interrupted at once. The function that is returned says which keys
    are pressed once it asks, and what the task is then."""
    run = progress._Watch.run
    seen = iter([True])

    def first(watch: Any) -> Any:
        if next(seen, False):
            raise KeyboardInterrupt
        return run(watch)

    monkeypatch.setattr(progress._Watch, "run", first)
    api.routes["POST", "/v1/vms/web1/start"] = task(state="running")

    def prepare(keys: bytes, state: str) -> None:
        # Not in a fixture: pytest sets these itself before it calls the test.
        monkeypatch.setattr(sys, "stdin", os.fdopen(terminal.slave.fileno(), closefd=False))
        stderr = os.fdopen(terminal.slave.fileno(), "w", closefd=False)
        monkeypatch.setattr(sys, "stderr", stderr)
        asked = progress._answer

        def answer(watch: Any) -> str | None:
            import undercroft.cli.terminal as module

            enter = module.keys

            def press(descriptor: int) -> Any:
                manager = enter(descriptor)

                class Pressed:
                    def __enter__(self) -> None:
                        manager.__enter__()
                        terminal.type(keys)

                    def __exit__(self, *what: Any) -> Any:
                        return manager.__exit__(*what)

                return Pressed()

            monkeypatch.setattr(module, "keys", press)
            return asked(watch)

        monkeypatch.setattr(progress, "_answer", answer)
        api.routes["GET", "/v1/tasks/task-1"] = lambda call: task(state=state)

    return prepare


Prepare = Callable[[bytes, str], None]


def test_a_task_that_ends_while_we_ask_was_waited_for(
    croft: Any, interrupted: Prepare, terminal: Terminal
) -> None:
    before = terminal.modes()
    interrupted(b"x", "succeeded")  # no answer, and no key that means anything
    done = croft("start", "web1")
    assert (done.code, "web1 is running" in done.out) == (0, True)
    assert "start web1 is not done yet" in (text := terminal.text())
    assert "it has ended" in text
    assert terminal.modes() == before


def test_c_cancels_without_enter(
    croft: Any, api: FakeApi, interrupted: Prepare, terminal: Terminal
) -> None:
    before = terminal.modes()
    interrupted(b"c", "cancelled")
    api.routes["POST", "/v1/tasks/task-1/cancel"] = task(state="running")
    assert croft("start", "web1").code == 1
    assert len(api.sent("POST", "/v1/tasks/task-1/cancel")) == 1
    assert "cancelling" in terminal.text()
    assert terminal.modes() == before


def test_enter_leaves_it_going(
    croft: Any, api: FakeApi, interrupted: Prepare, terminal: Terminal
) -> None:
    interrupted(b"\r", "running")
    assert croft("start", "web1").code == 130
    assert "croft task cancel task-1" in terminal.text()


EXPORT = {"kind": "export", "id": "exp-1", "name": "exp-1"}


def test_an_export_that_was_left_is_fetched_by_the_same_command(
    croft: Any, api: FakeApi, interrupted: Prepare, terminal: Terminal, tmp_path: Any
) -> None:
    export = {
        "meta": {"id": "exp-1", "name": "exp-1", "created": 1e9},
        "spec": {"source": "vm web1", "format": "ova", "disk": 0},
        "status": {"state": "pending"},
        "tasks": ["task-1"],
    }
    file = {"name": "a.ova", "size": 4, "sha256": "", "path": str(tmp_path / "none")}

    def made(state: str) -> Any:
        one = task(verb="export.create", state=state)
        return {**one, "spec": {**one["spec"], "object": EXPORT}}

    api.routes["POST", "/v1/exports"] = made("running")
    interrupted(b"\n", "running")
    api.routes["GET", "/v1/tasks/task-1"] = made("running")
    target = tmp_path / "a.ova"
    assert croft("export", "web1", str(target)).code == 130
    assert "is not written yet" in terminal.text()

    def finished(call: Any) -> Any:
        export["status"] = {"state": "ready", "files": [file]}
        return made("succeeded")

    api.routes["GET", "/v1/tasks/task-1"] = finished
    api.routes["GET", "/v1/exports/exp-1"] = lambda call: export
    api.routes["GET", "/v1/exports/exp-1/files/a.ova"] = b"DATA"
    api.routes["DELETE", "/v1/exports/exp-1"] = export
    assert croft("export", "web1", str(target)).code == 0
    assert len(api.sent("POST", "/v1/exports")) == 1
    assert target.read_bytes() == b"DATA"
    assert [path.name for path in tmp_path.iterdir()] == ["a.ova"]


def test_there_are_no_more_bars_than_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setenv("COLUMNS", "80")
    croft: Any = SimpleNamespace(err=Style(sys.stderr, {}))
    bars = progress._Bars(croft)
    try:
        tasks = [task(f"task-{n}", state="running") for n in range(50)]
        bars.update(tasks)
        assert len([t for t in bars._progress.tasks if t.visible]) == 10
        bars.update([task("task-0"), *tasks[1:]])  # the next one takes its place
        assert len([t for t in bars._progress.tasks if t.visible]) == 10
    finally:
        bars.close()
