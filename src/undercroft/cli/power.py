"""Switching VMs: every one of these takes several names and waits for all of them together."""

from __future__ import annotations

from undercroft.cli.command import Command, Namespace, Parser, add_names, duration
from undercroft.cli.errors import OK, ours, report
from undercroft.cli.output import dig, elapsed
from undercroft.cli.progress import failed, report_failures, wait
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from undercroft.cli.context import Croft


class Power(Command):
    """What all verbs have in common: ask for each VM, wait for all, tell how it went.

    ``verb`` is the API's, ``done`` what has become of the VM.
    """

    verb = ""
    done = ""

    def arguments(self, parser: Parser) -> None:
        add_names(parser)
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the task's id"
        )

    def request(self, args: Namespace) -> dict[str, object] | None:
        """What is sent along."""
        return None

    def run(self, croft: Croft, args: Namespace) -> int:
        body = self.request(args)
        return act(
            croft,
            args.names,
            lambda ref: croft.api.post(f"/v1/vms/{quote(ref)}/{self.verb}", body),
            self.done,
            no_wait=args.no_wait,
        )


def act(
    croft: Croft,
    refs: list[str],
    ask: Any,
    done: str | Callable[[Any], str],
    *,
    no_wait: bool,
) -> int:
    """Asks for a task per name (``ask``), waits for all, and tells what became of each.

    One that is refused does not hold up the others.
    """
    code = OK
    tasks = []
    for ref in dict.fromkeys(refs):
        try:
            tasks.append(ask(ref))
        except Exception as error:
            known = ours(error)
            if known is None or known.code == "daemon":
                raise
            code = report(croft, known) or code
    if no_wait:
        if croft.json:
            _print(croft, tasks, refs)
        else:
            for task in tasks:
                print(task["meta"]["id"])
        return code
    tasks = wait(croft, tasks)
    if croft.json:
        _print(croft, tasks, refs)
    for task in tasks:
        if not failed(task):
            took = (dig(task, "status.finished") or 0) - dig(task, "meta.created", 0)
            time = croft.out.paint(elapsed(max(took, 0)), "dim")
            what = done if isinstance(done, str) else done(task)
            croft.say(f"{dig(task, 'spec.object.name')} {what}   {time}")
    return report_failures(croft, tasks) or code


def _print(croft: Croft, tasks: list[Any], refs: list[str]) -> None:
    croft.print_json(tasks[0] if len(refs) == 1 and tasks else tasks)


class Start(Power):
    """``croft start VM…``"""

    verb, done = "start", "is running"
    description = """
        Switches VMs on, with the CPUs and memory that they are set to. Comes back as soon as the
        virtual machine runs; its operating system is booting then: watch it with croft console.
    """
    examples = (
        ("croft start web1", "switch one on"),
        ("croft start web1 web2 db1", "several at once"),
    )


class Stop(Power):
    """``croft stop VM…``"""

    verb, done = "stop", "is stopped"
    description = """
        Asks the guest to shut down: through its agent where one runs, else by the power button. If
        it has not done so in time (60 seconds, unless the VM is set otherwise), it is switched off.
    """
    examples: tuple[tuple[str, str], ...] = (
        ("croft stop web1", "shut down; switch off after a minute"),
        ("croft stop --timeout 5m db1", "give it more time"),
        ("croft stop --force web1", "pull the plug"),
    )

    def arguments(self, parser: Parser) -> None:
        super().arguments(parser)
        parser.add_argument("-f", "--force", action="store_true", help="switch off at once")
        parser.add_argument(
            "-t", "--timeout", type=duration, metavar="TIME", help="wait so long before that: 90s"
        )

    def request(self, args: Namespace) -> dict[str, object] | None:
        return {"force": args.force, "timeout": args.timeout}


class Restart(Stop):
    """``croft restart VM…``"""

    verb, done = "restart", "is running"
    description = """
        Shuts down as croft stop does, then starts again. What croft set changed (CPUs, memory, …)
        takes effect.
    """
    examples = (
        ("croft restart web1", "shut down and start"),
        ("croft restart --force web1", "without asking the guest"),
    )


class Reset(Power):
    """``croft reset VM…``"""

    verb, done = "reset", "was reset"
    description = """
        Presses the reset button: the guest boots anew at once, whatever it was doing. Unsaved data
        in it is lost.
    """
    examples = (("croft reset web1", "when nothing else helps"),)


class Pause(Power):
    """``croft pause VM…``"""

    verb, done = "pause", "is paused"
    description = "Stops the CPUs of VMs. Memory stays as it is; croft resume lets them go on."
    examples = (("croft pause web1", "hold it"), ("croft resume web1", "let it go on"))


class Resume(Power):
    """``croft resume VM…``"""

    verb, done = "resume", "is running"
    description = "Lets VMs go on that were paused or suspended, exactly where they were."
    examples = (("croft resume web1", "let it go on"),)


class Suspend(Power):
    """``croft suspend VM…``"""

    verb, done = "suspend", "is suspended"
    description = """
        Saves the memory of VMs to disk and switches them off: they take no CPU and no memory until
        croft resume brings them back exactly where they were, even after the host was rebooted.
    """
    examples = (
        ("croft suspend web1", "save and switch off"),
        ("croft resume web1", "bring it back"),
    )
