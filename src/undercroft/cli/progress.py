"""Waiting for tasks, and showing how far they are."""

from __future__ import annotations

import sys
import time

from undercroft.cli.errors import Interrupted, ours
from undercroft.cli.output import dig, elapsed
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rich.progress import Progress, TaskID

    from undercroft.cli.context import Croft

FINAL = ("succeeded", "failed", "cancelled")
_SLICE = 0.2  # seconds between two looks at progress
_LONG_SLICE = 1.0  # the same where no bars move
_SEEN = 20  # tasks whose progress is looked at besides the first one's
_PATIENCE = 0.4  # seconds before a bar appears: most tasks are done by then
_GONE = 30.0  # seconds for which the daemon may be away while we wait


def title(task: Any) -> str:
    """How a task is called: ``start web1``, ``make image tiny``."""
    noun, _, verb = str(dig(task, "spec.verb", "")).rpartition(".")
    name = dig(task, "spec.object.name", "")
    if noun == "export":
        return "export"
    if noun == "vm":
        return f"{verb} {name}"
    return f"{'make' if verb == 'create' else verb} {noun} {name}"


def failed(task: Any) -> bool:
    """Whether a task ended in anything but success."""
    return bool(dig(task, "status.state") != "succeeded")


def wait(croft: Croft, tasks: list[Any]) -> list[Any]:
    """The tasks once they are final, with their progress shown meanwhile.

    Raises:
        Interrupted: the user pressed Ctrl-C and wants to go on without them.
    """
    watch = _Watch(croft, tasks)
    while True:
        try:
            return watch.run()
        except KeyboardInterrupt:
            watch.hide()
            if not _ask(croft, watch):
                raise Interrupted from None


class _Watch:
    """Tasks that are waited for, and what of them is on the screen."""

    def __init__(self, croft: Croft, tasks: list[Any]) -> None:
        self._croft = croft
        self._tasks = {task["meta"]["id"]: task for task in tasks}
        self._since = time.monotonic()
        self._bars: _Bars | None = None
        self._phases: dict[str, str] = {}

    @property
    def unfinished(self) -> list[Any]:
        return [t for t in self._tasks.values() if dig(t, "status.state") not in FINAL]

    def run(self) -> list[Any]:
        try:
            while pending := self.unfinished:
                self._look(pending)
                self._show()
            return list(self._tasks.values())
        finally:
            self.hide()

    def ended(self) -> bool:
        """Whether all are final by now; an absent daemon says nothing about that."""
        for id in [task["meta"]["id"] for task in self.unfinished]:
            try:
                self._tasks[id] = self._croft.api.get(f"/v1/tasks/{id}")
            except Exception as error:
                if (known := ours(error)) is None or known.code != "daemon":
                    raise
                return False
            if dig(self._tasks[id], "status.state") not in FINAL:
                return False
        return True

    def hide(self) -> None:
        """Takes the bars off the screen."""
        if self._bars is not None:
            self._bars.close()
            self._bars = None

    def _look(self, pending: list[Any]) -> None:
        """Waits a moment for the first of them, then looks at others if their bars are seen: not
        at all of many, which would keep the daemon from its work."""
        first, *others = (task["meta"]["id"] for task in pending)
        bars = self._croft.err.tty
        self._tasks[first] = self._get(first, {"wait": _SLICE if bars else _LONG_SLICE})
        for id in others[:_SEEN] if bars else ():
            self._tasks[id] = self._get(id, None)

    def _get(self, id: str, params: dict[str, object] | None) -> Any:
        """The task, even if the daemon is restarted meanwhile: the task outlives it."""
        deadline = time.monotonic() + _GONE
        while True:
            try:
                return self._croft.api.get(f"/v1/tasks/{id}", params)
            except Exception as error:
                known = ours(error)
                if known is None or known.code != "daemon" or time.monotonic() > deadline:
                    raise
                time.sleep(_SLICE)

    def _show(self) -> None:
        croft = self._croft
        if croft.quiet or (croft.json and not croft.err.tty):
            return
        if croft.err.tty:
            if self._bars is None and time.monotonic() - self._since >= _PATIENCE:
                self._bars = _Bars(croft)
            if self._bars is not None:
                self._bars.update(list(self._tasks.values()))
            return
        for id, task in self._tasks.items():
            phase = str(dig(task, "status.phase", ""))
            if phase and phase != self._phases.get(id):
                self._phases[id] = phase
                croft.note(f"{title(task)}: {croft.err.clean(phase)}")


class _Bars:
    """A line per task, redrawn in place."""

    def __init__(self, croft: Croft) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._clean = croft.err.clean
        console = Console(stderr=True, no_color=not croft.err.color, highlight=False)
        self._progress: Progress = Progress(
            SpinnerColumn("dots" if croft.err.unicode else "line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[percent]:>4}", markup=False),
            TextColumn("{task.fields[took]:>7}", markup=False),
            TextColumn("{task.fields[phase]}", markup=False, style="dim"),
            console=console,
            transient=True,
        )
        self._ids: dict[str, TaskID] = {}
        self._progress.start()

    def update(self, tasks: list[Any]) -> None:
        # What has scrolled out at the top cannot be taken off the screen any more.
        room = max(self._progress.console.height - 2, 1)
        for task in tasks:
            id = task["meta"]["id"]
            done = dig(task, "status.state") in FINAL
            share = 1.0 if done else dig(task, "status.progress")
            room -= not done
            seen = not done and room >= 0
            if id not in self._ids:
                if not seen:
                    continue
                self._ids[id] = self._progress.add_task(title(task), phase="", percent="", took="")
            self._progress.update(
                self._ids[id],
                total=None if share is None else 1.0,
                completed=share or 0.0,
                visible=seen,
                took=elapsed(max(time.time() - dig(task, "meta.created", 0), 0)),
                phase=self._clean(str(dig(task, "status.phase", ""))),
                percent="" if share is None else f"{share:.0%}",
            )

    def close(self) -> None:
        self._progress.stop()


def _ask(croft: Croft, watch: _Watch) -> bool:
    """After Ctrl-C: leave the tasks going, cancel them, or wait on (True)? If they end meanwhile
    there is nothing left to ask."""
    tasks = watch.unfinished
    if not tasks:
        return True
    answer = ""
    if croft.err.tty and sys.stdin.isatty():
        names = ", ".join(title(task) for task in tasks[:3]) + (" and others" if tasks[3:] else "")
        paint = croft.err.paint
        sys.stderr.write(
            f"\n{names} is not done yet. {paint('Enter', 'bold')} leaves it going, "
            f"{paint('c', 'bold')} cancels it, {paint('w', 'bold')} waits on: "
        )
        sys.stderr.flush()
        try:
            found = _answer(watch)
        except KeyboardInterrupt:  # the second one means it
            found = "c"
        print(found if found else "it has ended" if found is None else "", file=sys.stderr)
        if found is None:
            return True
        answer = found
    tasks = watch.unfinished
    if answer == "w":
        return True
    if answer == "c":
        for task in tasks:
            croft.api.post(f"/v1/tasks/{task['meta']['id']}/cancel")
        croft.note("cancelling; what is half done is being undone …")
        return True
    style = croft.err
    for task in tasks:
        id = task["meta"]["id"]
        croft.note(f"{title(task)} goes on in the background")
        croft.note(f"  follow  {style.paint(f'croft task wait {id}', 'cyan')}")
        croft.note(f"  cancel  {style.paint(f'croft task cancel {id}', 'cyan')}")
    return False


def _answer(watch: _Watch) -> str | None:
    """The key that was pressed: "c", "w", or "" for Enter; None if the tasks ended before."""
    import os
    import select

    from undercroft.cli.terminal import keys

    descriptor = sys.stdin.fileno()
    with keys(descriptor):
        while True:
            if select.select([descriptor], [], [], _SLICE)[0]:
                key = os.read(descriptor, 1).lower()
                if key in (b"c", b"w"):
                    return key.decode()
                if key in (b"\r", b"\n", b"\x04", b""):  # Enter, Ctrl-D, the terminal is gone
                    return ""
            elif watch.ended():
                return None


def report_failures(croft: Croft, tasks: list[Any], *, started: bool = False) -> int:
    """Tells why tasks failed; returns the exit code: that of the first failure, or 0. ``started``:
    they were to start VMs that they made, which may be there all the same."""
    from undercroft.cli import errors

    code = errors.OK
    for task in tasks:
        if not failed(task):
            continue
        problem = dig(task, "status.error")
        if problem is None:
            from undercroft.model.errors import CancelledTaskError

            outcome = errors.report(croft, CancelledTaskError(f"{title(task)} was cancelled"))
        else:
            import msgspec

            from undercroft.model.errors import Problem, error_from_problem

            error = error_from_problem(msgspec.convert(problem, Problem))
            if started and (left := _left(croft, task)):
                error.action = f"{error.action}\n{left}" if error.action else left
            outcome = errors.report(croft, error)
        code = code or outcome
    return code


def _left(croft: Croft, task: Any) -> str:
    """What to do about a VM that was made, but could not be started; "" if there is none."""
    try:
        vm = croft.api.get(f"/v1/vms/{quote(str(dig(task, 'spec.object.id')))}")
    except Exception as error:
        if ours(error) is None:
            raise
        return ""  # what went wrong is told in any case
    if dig(vm, "status.state") != "stopped":
        return ""
    name = dig(vm, "meta.name")
    return (
        f"vm {name} is there, switched off: change it (croft set {name} --memory …) and start it, "
        f"or croft rm {name}"
    )
