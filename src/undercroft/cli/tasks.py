"""Tasks: what is under way, and how it went."""

from __future__ import annotations

import time

from undercroft.cli.command import Command, Namespace, Parser, add_names
from undercroft.cli.errors import OK
from undercroft.cli.output import Table, ago, dig, elapsed
from undercroft.cli.progress import FINAL, failed, report_failures, title, wait
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft


class Ls(Command):
    """``croft task ls``"""

    description = """
        Lists what is under way and what was done lately, newest last. Tasks outlive the command
        that asked for them, and the daemon too.
    """
    examples = (
        ("croft task ls", "the last 20"),
        ("croft task ls --running", "only what is under way"),
        ("croft task ls --all", "all that are still remembered"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("-a", "--all", action="store_true", help="all that are remembered")
        parser.add_argument("-r", "--running", action="store_true", help="only unfinished ones")
        parser.add_argument("-n", type=int, default=20, metavar="N", help="so many (default: 20)")

    def run(self, croft: Croft, args: Namespace) -> int:
        tasks: list[Any] = list(croft.api.list("/v1/tasks", {"sort": "meta.created"}))
        if args.running:
            tasks = [task for task in tasks if dig(task, "status.state") not in FINAL]
        elif not args.all:
            tasks = tasks[-max(args.n, 0) :] if args.n > 0 else []
        if croft.json:
            croft.print_json(tasks)
            return OK
        if croft.quiet:
            for task in tasks:
                print(dig(task, "meta.id", ""))
            return OK
        if not tasks:
            croft.note("nothing is under way" if args.running else "no tasks yet")
            return OK
        now = time.time()
        table = Table(croft.out, ("ID", "TASK", "STATE", ">DONE", ">TOOK", "AGE", "PHASE"))
        for task in tasks:
            state = dig(task, "status.state", "")
            created = dig(task, "meta.created", now)
            end = dig(task, "status.finished") or now
            progress = dig(task, "status.progress")
            phase = dig(task, "status.phase", "") if state not in FINAL else ""
            table.add(
                dig(task, "meta.id", ""),
                title(task),
                state,
                f"{progress:.0%}" if state == "running" and progress is not None else "",
                elapsed(max(end - created, 0)),
                ago(now - created),
                phase or dig(task, "status.error.detail", ""),
            )
        print(table.render(), end="")
        return OK


class Show(Command):
    """``croft task show TASK``"""

    description = "Shows what a task is about, how far it is, and what went wrong if it failed."
    examples = (("croft task show task-3f9k…", "an id of croft task ls"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "TASK", plural=False)

    def run(self, croft: Croft, args: Namespace) -> int:
        task = croft.api.get(f"/v1/tasks/{quote(args.name)}")
        if croft.json:
            croft.print_json(task)
            return OK
        from undercroft.cli.detail import task_detail

        print(task_detail(croft, task), end="")
        return OK


class Wait(Command):
    """``croft task wait TASK…``"""

    description = """
        Shows the progress of tasks until they are done. It fails if one of them does. Ctrl-C asks
        whether to leave or to cancel them.
    """
    examples = (
        ("croft task wait $(croft start web1 --no-wait)", "later rather than at once"),
        ("croft task wait $(croft task ls -q --running)", "whatever is under way"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "TASK")

    def run(self, croft: Croft, args: Namespace) -> int:
        names = list(dict.fromkeys(args.names))
        tasks = wait(croft, [croft.api.get(f"/v1/tasks/{quote(id)}") for id in names])
        if croft.json:
            croft.print_json(tasks[0] if len(names) == 1 else tasks)
        for task in tasks:
            if not failed(task):
                croft.say(f"{title(task)} is done")
        return report_failures(croft, tasks)


class Cancel(Command):
    """``croft task cancel TASK…``"""

    description = """
        Asks tasks to stop. What is half done is undone; what cannot be undone any more is finished.
    """
    examples = (("croft task cancel $(croft task ls -q --running)", "stop whatever is under way"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "TASK")

    def run(self, croft: Croft, args: Namespace) -> int:
        names = list(dict.fromkeys(args.names))
        for id in names:
            croft.api.post(f"/v1/tasks/{quote(id)}/cancel")
        tasks = wait(croft, [croft.api.get(f"/v1/tasks/{quote(id)}") for id in names])
        if croft.json:
            croft.print_json(tasks[0] if len(names) == 1 else tasks)
        for task in tasks:
            state = dig(task, "status.state")
            was = "is cancelled" if state == "cancelled" else f"had {state} already"
            croft.say(f"{title(task)} {was}")
        return OK
