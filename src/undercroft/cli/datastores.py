"""Datastores: where the disks of VMs are kept."""

from __future__ import annotations

import argparse

from undercroft.cli.command import Command, Namespace, Parser, add_names, label
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import Table, dig, fields, local_time, size
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft


def share(text: str) -> float:
    """A share of the whole from ``80%`` or ``0.8``.

    Raises:
        ArgumentTypeError: it is not one.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 80%")
    return value


def _thresholds(parser: Parser) -> None:
    parser.add_argument(
        "--warning", type=share, metavar="SHARE", help="warn when so much is in use: 80%%"
    )
    parser.add_argument(
        "--critical", type=share, metavar="SHARE", help="warn again when so much is: 95%%"
    )


class Create(Command):
    """``croft datastore create NAME``"""

    description = """
        Makes a directory of the host a place for disks, beside the one in the data directory
        (local): another disk, or what is mounted from elsewhere. It is marked, so that an empty
        mount point is never taken for it.
    """
    examples = (
        ("croft datastore create fast --path /srv/nvme/vms", "a directory on another disk"),
        ("croft run debian:12 --name web1 --datastore fast", "a VM with its disk there"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="of the datastore")
        parser.add_argument("--path", required=True, metavar="DIR", help="on the daemon's host")
        parser.add_argument("--default", action="store_true", help="new disks go there")
        _thresholds(parser)
        parser.add_argument(
            "-l", "--label", action="append", type=label, metavar="KEY=VALUE", help="a label"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        import os

        body: dict[str, Any] = {"name": args.name, "path": os.path.abspath(args.path)}
        body |= _given(args)
        if args.label:
            body["labels"] = dict(args.label)
        made = croft.api.post("/v1/datastores", body)
        if croft.json:
            croft.print_json(made)
        else:
            status = made["status"]
            shares = ", copies share blocks" if status.get("reflink") else ""
            path = croft.out.clean(dig(made, "spec.path", body["path"]))
            told = f"datastore {args.name} is there: {path}"
            croft.say(f"{told} ({size(status['free'])} free{shares})")
        return OK


def _given(args: Namespace) -> dict[str, Any]:
    names = ("warning", "critical")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return given | ({"default": True} if args.default else {})


_COLOURS = {"warning": "yellow", "critical": "red"}


def _row(datastore: Any) -> tuple[str, ...]:
    capacity = dig(datastore, "status.capacity", 0)
    provisioned = dig(datastore, "status.provisioned", 0)
    full = f"{1 - dig(datastore, 'status.free', 0) / capacity:.0%}" if capacity else "-"
    default = " *" if dig(datastore, "spec.default", False) else ""
    return (
        dig(datastore, "meta.name", "") + default,
        dig(datastore, "status.state", ""),
        size(capacity),
        full,
        size(dig(datastore, "status.free")),
        size(dig(datastore, "status.used")),
        size(provisioned),
        f"{provisioned / capacity:.2f}" if capacity else "-",
        dig(datastore, "spec.path", ""),
    )


class Ls(Command):
    """``croft datastore ls``"""

    description = """
        Lists datastores: how large and how full they are, what volumes take of them, and what
        guests were promised (PROMISED, and as a multiple of the capacity): thin disks may add up to
        more than there is. New disks go to the one with a star, unless you say otherwise.
    """
    examples = (("croft datastore ls", "all of them"),)

    def run(self, croft: Croft, args: Namespace) -> int:
        found = list(croft.api.list("/v1/datastores", {"sort": "meta.name"}))
        if croft.json:
            croft.print_json(found)
            return OK
        if croft.quiet:
            for datastore in found:
                print(dig(datastore, "meta.name", ""))
            return OK
        columns = (
            "NAME",
            "STATE",
            ">CAPACITY",
            ">FULL",
            ">FREE",
            ">USED",
            ">PROMISED",
            ">×",
            "PATH",
        )
        table = Table(croft.out, columns)
        for datastore in found:
            colour = _COLOURS.get(dig(datastore, "status.fill", ""))
            table.add(*_row(datastore), paint={"FULL": colour} if colour else None)
        print(table.render(), end="")
        for datastore in found:
            if message := dig(datastore, "status.message"):
                croft.note(message)
        return OK


class Show(Command):
    """``croft datastore show DATASTORE``"""

    description = "Shows a datastore: where it is, what is in it, when somebody is warned."
    examples = (("croft datastore show local", "the one in the data directory"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "DATASTORE", plural=False)

    def run(self, croft: Croft, args: Namespace) -> int:
        datastore = croft.api.get(f"/v1/datastores/{quote(args.name)}")
        if croft.json:
            croft.print_json(datastore)
            return OK
        style, status, spec = croft.out, datastore["status"], datastore["spec"]
        capacity, provisioned = status.get("capacity", 0), status.get("provisioned", 0)
        times = f" ({provisioned / capacity:.2f} times the capacity)" if capacity else ""
        shares = "share blocks" if status.get("reflink") else "are made block by block"
        pairs = [
            ("path", style.clean(spec.get("path", ""))),
            ("default", "new disks go here" if spec.get("default") else ""),
            ("capacity", f"{size(capacity)}, {size(status.get('free'))} free"),
            ("volumes", f"take {size(status.get('used'))}"),
            ("promised", f"{size(provisioned)}{times}"),
            ("copies", shares),
            ("warns at", f"{spec.get('warning', 0.8):.0%} and {spec.get('critical', 0.95):.0%}"),
            ("message", style.clean(status.get("message") or "")),
            ("created", local_time(dig(datastore, "meta.created", 0))),
            ("id", dig(datastore, "meta.id", "")),
        ]
        head = style.paint(dig(datastore, "meta.name", ""), "bold")
        body = fields(style, [(a, b) for a, b in pairs if b])
        print(f"{head}  {style.state(status.get('state', ''))}")
        print("".join(f"  {line}\n" for line in body.splitlines()), end="")
        return OK


class Set(Command):
    """``croft datastore set DATASTORE``"""

    description = """
        Changes the name of a datastore, or when it warns that it fills, or makes it the one that
        new disks go to.
    """
    examples = (
        ("croft datastore set fast --warning 70% --critical 90%", "warn earlier"),
        ("croft datastore set fast --default", "new disks go there"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "DATASTORE", plural=False)
        parser.add_argument("--name", dest="new_name", metavar="NEW", help="another name")
        parser.add_argument("--default", action="store_true", help="new disks go there")
        _thresholds(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        body = _given(args)
        if args.new_name is not None:
            body["name"] = args.new_name
        if not body:
            raise UsageError("there is nothing to change", "see: croft datastore set --help")
        changed = croft.api.patch(f"/v1/datastores/{quote(args.name)}", body)
        if croft.json:
            croft.print_json(changed)
        else:
            croft.say(f"datastore {dig(changed, 'meta.name')} is changed")
        return OK


class Rm(Command):
    """``croft datastore rm DATASTORE…``"""

    description = "Makes directories no datastores any more. Nothing may be in them; they stay."
    examples = (("croft datastore rm fast", "remove one"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "DATASTORE")

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.errors import ours, report

        code, gone = OK, []
        for name in dict.fromkeys(args.names):
            try:
                gone.append(croft.api.delete(f"/v1/datastores/{quote(name)}"))
            except Exception as error:
                known = ours(error)
                if known is None or known.code == "daemon":
                    raise
                code = report(croft, known) or code
                continue
            croft.say(f"datastore {name} is removed")
        if croft.json:
            croft.print_json(gone)
        return code
