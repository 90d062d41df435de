"""Clones: VMs that begin as what another is."""

from __future__ import annotations

from undercroft.cli.command import (
    Command,
    Namespace,
    Parser,
    add_encryption,
    encryption,
    label,
    size,
)
from undercroft.cli.errors import OK, UsageError, closest, ours
from undercroft.cli.output import dig, elapsed
from undercroft.cli.progress import failed, report_failures, wait
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft


class Clone(Command):
    """``croft clone SOURCE [NAME…]``"""

    description = """
        Makes VMs that begin as what another VM, or a template, is. A linked clone takes no room
        and no time: its disks lie on those of its source, which never change beneath it, whatever
        becomes of the source. A full clone has copies. An instant clone also shares the memory of
        its source and goes on from where that is, in a moment; it becomes an individual (host name,
        addresses, keys, random numbers) before its network is connected. The source goes on.
    """
    examples = (
        ("croft clone web1 web2", "a linked clone, switched off"),
        ("croft clone web1 web2 --full --start", "with disks of its own, switched on"),
        ("croft clone web1 --instant --count 10", "ten that go on from where web1 is"),
        ("croft clone debian-warm web2", "from a template: instant, if it has memory"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("source", metavar="SOURCE", help="name or id of a VM or template")
        parser.add_argument("names", nargs="*", metavar="NAME", help="(default: SOURCE-1, …)")
        kind = parser.add_mutually_exclusive_group()
        for mode, text in (
            ("linked", "disks lie on those of the source"),
            ("full", "disks are copies"),
            ("instant", "go on from what the source has in memory"),
        ):
            kind.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=text)
        parser.add_argument("--count", type=int, metavar="N", help="how many")
        parser.add_argument("-s", "--start", action="store_true", help="switch them on")
        parser.add_argument(
            "--quiesce", action="store_true", help="the source's file systems in order first"
        )
        parser.add_argument("-c", "--cpus", type=int, metavar="N", help="other than the source's")
        parser.add_argument("-m", "--memory", type=size, metavar="SIZE", help="likewise")
        parser.add_argument(
            "--datastore", metavar="DATASTORE", help="for their disks (default: the source's)"
        )
        add_encryption(parser)
        parser.add_argument("--hostname", metavar="NAME", help="(default: the VM's name)")
        parser.add_argument(
            "-l", "--label", action="append", type=label, metavar="KEY=VALUE", help="a label"
        )
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the tasks' ids"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        if args.names and args.count not in (None, len(args.names)):
            raise UsageError(f"{len(args.names)} names for {args.count} clones: give one or other")
        body = _request(args)
        tasks = _ask(croft, args.source, body)
        if args.no_wait:
            if croft.json:
                croft.print_json(tasks)
            else:
                for task in tasks:
                    print(task["meta"]["id"])
            return OK
        tasks = wait(croft, tasks)
        if croft.json:
            croft.print_json(tasks)
        for task in tasks:
            if failed(task):
                continue
            name = dig(task, "spec.object.name")
            took = (dig(task, "status.finished") or 0) - dig(task, "meta.created", 0)
            mode = dig(task, "spec.arguments.mode")
            runs = " and runs" if args.start or mode == "instant" else ""
            time = croft.out.paint(elapsed(max(took, 0)), "dim")
            croft.say(f"{name} is {_article(mode)} clone of {args.source}{runs}   {time}")
            _warn(croft, task)
        return report_failures(croft, tasks, started=args.start)


def _article(mode: str) -> str:
    return f"an {mode}" if mode == "instant" else f"a {mode}"


def _request(args: Namespace) -> dict[str, Any]:
    names = ("mode", "cpus", "memory", "hostname", "count", "datastore")
    body: dict[str, Any] = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.names:
        body["names"] = args.names
        body.pop("count", None)
    if args.start:
        body["start"] = True
    if args.quiesce:
        body["quiesce"] = True
    body |= encryption(args)
    if args.label:
        body["labels"] = dict(args.label)
    return body


def _ask(croft: Croft, source: str, body: dict[str, Any]) -> list[Any]:
    """The tasks; the source is a VM, or else a template."""
    if not source.startswith("tpl-"):
        try:
            return list(croft.api.post(f"/v1/vms/{quote(source)}/clone", body)["tasks"])
        except Exception as error:
            known = ours(error)
            if known is None or known.code != "not-found":
                raise
        try:
            return list(croft.api.post(f"/v1/templates/{quote(source)}/clone", body)["tasks"])
        except Exception as error:
            known = ours(error)
            if known is None or known.code != "not-found":
                raise
            raise _unknown(croft, source) from None
    return list(croft.api.post(f"/v1/templates/{quote(source)}/clone", body)["tasks"])


def _unknown(croft: Croft, source: str) -> Exception:
    from undercroft.cli.fetch import template_names
    from undercroft.model.errors import NotFoundError

    names = [str(dig(vm, "meta.name")) for vm in croft.api.list("/v1/vms", {"fields": "meta.name"})]
    lists = "croft ls, croft template ls"
    action = f"see what exists with: {lists}"
    if found := closest(source, dict.fromkeys([*names, *template_names(croft)]), 3):
        action = f"did you mean {' or '.join(found)}? All of them: {lists}"
    return NotFoundError(f"there is no VM or template {source}", object=source, action=action)


def _warn(croft: Croft, task: Any) -> None:
    """What of the identity of its source a clone still has."""
    if shares := dig(task, "status.result.shares"):
        croft.note(
            f"{dig(task, 'spec.object.name')} still shares with its source: {', '.join(shares)} "
            "(its guest agent did not see to that)"
        )
