"""How volumes lie on each other, and what they take."""

from __future__ import annotations

from undercroft.cli.command import Command, Namespace, Parser, add_encryption, add_names, encryption
from undercroft.cli.command import size as to_size
from undercroft.cli.errors import OK
from undercroft.cli.output import Table, dig, size
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from undercroft.cli.context import Croft


class Clone(Command):
    """``croft volume clone SOURCE NAME``"""

    description = """
        Makes a disk that begins as another is, also while a VM uses that. It takes no room and no
        time: both lie on what they have in common, which never changes, whatever becomes of either.
        With --full it has a copy of its own.
    """
    examples = (
        ("croft volume clone data1 data2", "over what both have in common"),
        ("croft volume clone web1-boot copy --full", "a copy, of a disk that is in use"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("source", metavar="VOLUME", help="name or id of the volume")
        parser.add_argument("name", metavar="NAME", help="of the new one")
        parser.add_argument("--full", action="store_true", help="with a copy of its own")
        parser.add_argument("-s", "--size", type=to_size, metavar="SIZE", help="larger: 20G")
        parser.add_argument(
            "--datastore", metavar="DATASTORE", help="where (default: beside its source)"
        )
        add_encryption(parser)
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the task's id"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        body: dict[str, Any] = {"name": args.name, "full": args.full}
        for name in ("size", "datastore"):
            if getattr(args, name) is not None:
                body[name] = getattr(args, name)
        body |= encryption(args)
        kind = "full" if args.full else "linked"
        return act(
            croft,
            [args.source],
            lambda ref: croft.api.post(f"/v1/volumes/{quote(ref)}/clone", body),
            f"is a {kind} clone of {args.source}",
            no_wait=args.no_wait,
        )


class Flatten(Command):
    """``croft volume flatten VOLUME…``"""

    description = """
        Has disks take over all that they lie on: what clones, snapshots and images share with them.
        Afterwards they need nothing of others, and take more room. A VM may run meanwhile.
    """
    examples = (("croft volume flatten data2", "make it stand on its own"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "VOLUME")
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the task's id"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        return act(
            croft,
            args.names,
            lambda ref: croft.api.post(f"/v1/volumes/{quote(ref)}/flatten", None),
            "needs nothing of others",
            no_wait=args.no_wait,
        )


class Tree(Command):
    """``croft volume tree [VOLUME]``"""

    description = """
        Shows how disks lie on each other: images at the bottom, above them the layers that
        snapshots, templates and clones share, at the top what each volume writes to. A layer that
        something lies on never changes and cannot be removed.
    """
    examples = (
        ("croft volume tree", "everything"),
        ("croft volume tree web1-boot", "only what has to do with one"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="VOLUME", nargs="?", help="name or id of the volume")

    def run(self, croft: Croft, args: Namespace) -> int:
        nodes = croft.api.get("/v1/layers")["nodes"]
        if args.name is not None:
            volume = croft.api.get(f"/v1/volumes/{quote(args.name)}")
            nodes = _related(nodes, dig(volume, "status.head", ""))
        if croft.json:
            croft.print_json({"nodes": nodes})
            return OK
        if not nodes:
            croft.note("no volumes yet")
        children: dict[str, list[Any]] = {}
        known = {node["id"] for node in nodes}
        for node in nodes:
            parent = node.get("parent")
            children.setdefault(parent if parent in known else "", []).append(node)
        for root in children.get("", ()):
            for line in _lines(croft, root, children, "", ""):
                print(line)
        return OK


def _related(nodes: list[Any], head: str) -> list[Any]:
    """What a layer lies on, and all that lies on that."""
    by_id = {node["id"]: node for node in nodes}
    wanted: set[str] = set()
    at = head
    bottom = head
    while at in by_id:
        bottom = at
        wanted.add(at)
        parent = by_id[at].get("parent") or ""
        if by_id.get(parent, {}).get("kind") == "image":
            wanted.add(parent)
            break
        at = parent
    above = {bottom}
    for node in nodes:  # what lies beneath comes first
        if node.get("parent") in above:
            above.add(node["id"])
    return [node for node in nodes if node["id"] in wanted | above]


def _lines(
    croft: Croft, node: Any, children: dict[str, list[Any]], first: str, rest: str
) -> Iterator[str]:
    yield first + _text(croft, node)
    below = children.get(node["id"], [])
    for number, child in enumerate(below):
        last = number == len(below) - 1
        branch, line = ("└─ ", "   ") if last else ("├─ ", "│  ")
        if not croft.out.unicode:
            branch, line = ("`- ", "   ") if last else ("|- ", "|  ")
        yield from _lines(croft, child, children, rest + branch, rest + line)


def _text(croft: Croft, node: Any) -> str:
    style = croft.out
    sizes = style.paint(f"{size(node.get('allocated'))} of {size(node.get('size'))}", "dim")
    if node["kind"] == "image":
        return f"image {style.paint(style.clean(node.get('name', '')), 'bold')}  {sizes}"
    names = [_keeper(style.clean(ref["name"]), ref) for ref in node.get("kept", ())]
    if volume := node.get("volume"):
        names.insert(0, f"volume {style.paint(style.clean(volume['name']), 'bold')}")
    what = ", ".join(names) or style.paint("shared", "dim")
    return f"{what}  {sizes}"


def _keeper(name: str, ref: Any) -> str:
    return f"{ref['kind']} {name}" + (f" of {ref['of']}" if ref.get("of") else "")


class Usage(Command):
    """``croft volume usage``"""

    description = """
        Shows what volumes take on the host: OWN is freed when the volume goes, SHARED is what it
        lies on that others need too (counted once in the sum).
    """
    examples = (("croft volume usage", "the largest first"),)

    def run(self, croft: Croft, args: Namespace) -> int:
        volumes = list(croft.api.list("/v1/volumes", {"sort": "-status.allocated"}))
        nodes = croft.api.get("/v1/layers")["nodes"]
        layers = [node for node in nodes if node["kind"] == "layer"]
        taken = sum(node.get("allocated", 0) for node in layers)
        provisioned = sum(dig(volume, "spec.size", 0) for volume in volumes)
        if croft.json:
            report = {
                "taken": taken,
                "provisioned": provisioned,
                "volumes": [
                    {
                        "id": dig(volume, "meta.id"),
                        "name": dig(volume, "meta.name"),
                        "size": dig(volume, "spec.size"),
                        "own": dig(volume, "status.allocated", 0),
                        "shared": dig(volume, "status.shared", 0),
                    }
                    for volume in volumes
                ],
            }
            croft.print_json(report)
            return OK
        if not volumes:
            croft.note("no volumes yet: every VM with a disk has one")
            return OK
        table = Table(croft.out, ("NAME", ">SIZE", ">OWN", ">SHARED"))
        for volume in volumes:
            table.add(
                dig(volume, "meta.name", ""),
                size(dig(volume, "spec.size")),
                size(dig(volume, "status.allocated", 0)),
                size(dig(volume, "status.shared", 0)),
            )
        print(table.render(), end="")
        croft.say(f"all together take {size(taken)} of the {size(provisioned)} that guests see")
        return OK


class Check(Command):
    """``croft volume check``"""

    description = """
        Looks for files that no volume accounts for, layers that are gone, clusters that are leaked
        or corrupt, and volumes of VMs that are gone. It changes nothing unless --repair is given:
        then what is leaked is given back. Exit code 1 if something remains that is not in order.
        Disks of VMs that run are not looked into.
    """
    examples = (
        ("croft volume check", "look"),
        ("croft volume check --repair", "look, and give back what is leaked"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("--repair", action="store_true", help="give back what is leaked")

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.hosts import print_report

        report = croft.api.post("/v1/hosts/self/volumes/check", {"repair": args.repair})
        return print_report(croft, report, args.repair, "croft volume check --repair")
