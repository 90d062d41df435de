"""Snapshots: VMs as they were."""

from __future__ import annotations

import time

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import OK
from undercroft.cli.output import Table, ago, dig, size
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from undercroft.cli.context import Croft


def _path(vm: str, snapshot: str | None = None, rest: str = "") -> str:
    path = f"/v1/vms/{quote(vm)}/snapshots"
    return path if snapshot is None else f"{path}/{quote(snapshot)}{rest}"


def _one_vm(parser: Parser) -> None:
    parser.add_argument("vm", metavar="VM", help="name or id")


def _one_snapshot(parser: Parser) -> None:
    _one_vm(parser)
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="its name: croft snapshot ls VM")


def _no_wait(parser: Parser) -> None:
    parser.add_argument(
        "--no-wait", action="store_true", help="only ask for it; print the task's id"
    )


class Create(Command):
    """``croft snapshot create VM [NAME]``"""

    description = """
        Keeps what a VM's disks hold now, to go back to later. A running guest goes on meanwhile and
        hardly notices; what it had not written yet is not in the snapshot, as after a power cut,
        unless its agent brings its file systems in order first (--quiesce). With --memory it is all
        there: going back lets the guest go on in the middle of what it was doing.
    """
    examples = (
        ("croft snapshot create web1 before-upgrade", "keep what is on its disks"),
        ("croft snapshot create web1 --memory", "and in its memory; a name is chosen"),
        ("croft snapshot create db1 nightly --quiesce", "with its file systems in order"),
    )

    def arguments(self, parser: Parser) -> None:
        _one_vm(parser)
        parser.add_argument("name", nargs="?", metavar="NAME", help="(default: snap1, snap2, …)")
        parser.add_argument("-m", "--memory", action="store_true", help="also what is in memory")
        parser.add_argument(
            "--quiesce", action="store_true", help="file systems in order first, by its agent"
        )
        parser.add_argument("-d", "--description", default="", metavar="TEXT", help="what for")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        body = {"memory": args.memory, "quiesce": args.quiesce, "description": args.description}
        if args.name is not None:
            body["name"] = args.name
        from undercroft.cli.power import act

        return act(
            croft,
            [args.vm],
            lambda ref: croft.api.post(_path(ref), body),
            lambda task: f"is kept in snapshot {dig(task, 'spec.arguments.name')}",
            no_wait=args.no_wait,
        )


class Ls(Command):
    """``croft snapshot ls VM``"""

    description = """
        Lists the snapshots of a VM. The one that its present state comes from is marked with *.
    """
    examples = (
        ("croft snapshot ls web1", "oldest first"),
        ("croft snapshot ls web1 --tree", "which came from which"),
    )

    def arguments(self, parser: Parser) -> None:
        _one_vm(parser)
        parser.add_argument("--tree", action="store_true", help="draw which came from which")

    def run(self, croft: Croft, args: Namespace) -> int:
        found = list(croft.api.list(_path(args.vm)))
        if croft.json:
            croft.print_json(found)
            return OK
        if croft.quiet:
            for snapshot in found:
                print(dig(snapshot, "meta.name", ""))
            return OK
        if not found:
            croft.note(f"no snapshots yet: croft snapshot create {args.vm}")
            return OK
        now = dig(croft.api.get(f"/v1/vms/{quote(args.vm)}"), "status.snapshot")
        names = {dig(s, "meta.id"): dig(s, "meta.name", "") for s in found}
        if args.tree:
            for line in _tree(found, now):
                print(line)
            return OK
        table = Table(croft.out, ("NAME", "FROM", "STATE", ">MEMORY", "AGE", "DESCRIPTION"))
        for snapshot in found:
            memory = dig(snapshot, "status.memory", 0)
            table.add(
                dig(snapshot, "meta.name", "") + (" *" if dig(snapshot, "meta.id") == now else ""),
                names.get(dig(snapshot, "status.parent"), ""),
                dig(snapshot, "status.state", ""),
                size(memory) if memory else "-",
                ago(time.time() - dig(snapshot, "meta.created", 0)),
                dig(snapshot, "spec.description", ""),
            )
        print(table.render(), end="")
        return OK


def _tree(snapshots: list[Any], now: str | None) -> Iterator[str]:
    children: dict[str | None, list[Any]] = {}
    known = {dig(snapshot, "meta.id") for snapshot in snapshots}
    for snapshot in snapshots:
        parent = dig(snapshot, "status.parent")
        children.setdefault(parent if parent in known else None, []).append(snapshot)

    def below(parent: str | None, indent: str) -> Iterator[str]:
        own = children.get(parent, [])
        here = now == parent if parent is not None else now not in known
        rows: list[Any] = [*own, *([None] if here else [])]
        for index, snapshot in enumerate(rows):
            last = index == len(rows) - 1
            arm, more = ("└─ ", "   ") if last else ("├─ ", "│  ")
            if snapshot is None:
                yield f"{indent}{arm}(now)"
                continue
            yield f"{indent}{arm}{dig(snapshot, 'meta.name', '')}"
            yield from below(dig(snapshot, "meta.id"), indent + more)

    yield from below(None, "")


class Show(Command):
    """``croft snapshot show VM SNAPSHOT``"""

    description = "Shows a snapshot: when it was taken, of what, and what it comes from."
    examples = (("croft snapshot show web1 before-upgrade", "everything about one"),)

    def arguments(self, parser: Parser) -> None:
        _one_snapshot(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        snapshot = croft.api.get(_path(args.vm, args.snapshot))
        if croft.json:
            croft.print_json(snapshot)
            return OK
        from undercroft.cli.detail import snapshot_detail

        print(snapshot_detail(croft, snapshot), end="")
        return OK


class Revert(Command):
    """``croft snapshot revert VM SNAPSHOT``"""

    description = """
        Makes a VM what it was when the snapshot was taken: its disks, CPUs and memory size. What it
        has become since is lost, unless another snapshot has it. With memory in the snapshot the
        guest goes on where it was; else the VM is switched off.
    """
    examples = (
        ("croft snapshot revert web1 before-upgrade", "one that is stopped"),
        ("croft snapshot revert --force --start web1 clean", "switch off, go back, switch on"),
    )

    def arguments(self, parser: Parser) -> None:
        _one_snapshot(parser)
        parser.add_argument("-f", "--force", action="store_true", help="also if it runs")
        parser.add_argument("-s", "--start", action="store_true", help="switch it on afterwards")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        body = {"force": args.force, "start": args.start}
        return act(
            croft,
            [args.vm],
            lambda ref: croft.api.post(_path(ref, args.snapshot, "/revert"), body),
            f"is as it was in {args.snapshot}",
            no_wait=args.no_wait,
        )


class Rm(Command):
    """``croft snapshot rm VM SNAPSHOT…``"""

    description = """
        Forgets snapshots. The VM stays as it is, and so do snapshots that came later.
    """
    examples = (("croft snapshot rm web1 before-upgrade", "forget one"),)

    def arguments(self, parser: Parser) -> None:
        _one_vm(parser)
        parser.add_argument("snapshots", nargs="+", metavar="SNAPSHOT", help="names")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        return act(
            croft,
            args.snapshots,
            lambda name: croft.api.delete(_path(args.vm, name)),
            lambda task: f"no longer has snapshot {dig(task, 'spec.arguments.name')}",
            no_wait=args.no_wait,
        )
