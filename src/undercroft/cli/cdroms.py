"""CD-ROM drives and the discs in them."""

from __future__ import annotations

import os

from undercroft.cli.command import Command, Namespace, Parser, add_names
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import Table, dig
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft

BUSES = ("sata", "scsi")


def disc(text: str) -> dict[str, str]:
    """A drive with a disc in it from ``debian.iso`` or ``debian.iso:scsi``."""
    path, colon, bus = text.rpartition(":")
    return {"path": path, "bus": bus} if colon and bus in BUSES else {"path": text}


def host_path(croft: Croft, path: str) -> str:
    """A file as the daemon finds it; one that runs elsewhere has files of its own.

    Raises:
        UsageError: that would have to be said.
    """
    if croft.url is None:
        return os.path.abspath(path)
    if not path.startswith("/"):
        raise UsageError(
            f"{path} would be on the daemon's host, so where?", "write its path with / in front"
        )
    return path


def _arguments(parser: Parser, *, force: str) -> None:
    parser.add_argument("--drive", type=int, metavar="N", help="which drive, if there are several")
    parser.add_argument("-f", "--force", action="store_true", help=force)
    _no_wait(parser)


def _no_wait(parser: Parser) -> None:
    parser.add_argument(
        "--no-wait", action="store_true", help="only ask for it; print the task's id"
    )


def _drives(croft: Croft, name: str) -> list[Any]:
    return list(dig(croft.api.get(f"/v1/vms/{quote(name)}"), "spec.cdroms", ()))


def _choose(croft: Croft, args: Namespace, full: bool | None = None) -> int:
    """The drive that is meant: the one that was named, or the only one; ``full`` (or not): rather
    one that is so.

    Raises:
        UsageError: it could be several.
    """
    if args.drive is not None:
        return int(args.drive)
    drives = _drives(croft, args.name)
    found = [d for d in drives if full is not None and bool(d.get("medium")) is full] or drives
    if len(found) > 1 and (full is not False or found is drives):
        units = ", ".join(str(drive.get("unit", 0)) for drive in found)
        raise UsageError(f"which drive of {args.name}?", f"say --drive N, with N of {units}")
    # With none at all, the daemon says what to do.
    return int(found[0].get("unit", 0)) if found else 0


def _say(croft: Croft, args: Namespace, drive: int, verb: str, body: Any, done: str) -> int:
    from undercroft.cli.power import act

    path = f"/v1/vms/{quote(args.name)}/cdroms/{drive}/{verb}"
    return act(croft, [args.name], lambda _: croft.api.post(path, body), done, no_wait=args.no_wait)


class Ls(Command):
    """``croft cdrom ls VM``"""

    description = "Lists the CD-ROM drives of a VM, and what is in them."
    examples = (("croft cdrom ls web1", "which drives, which discs"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)

    def run(self, croft: Croft, args: Namespace) -> int:
        drives = _drives(croft, args.name)
        if croft.json:
            croft.print_json(drives)
            return OK
        if croft.quiet:
            for drive in drives:
                print(drive.get("unit", 0))
            return OK
        if not drives:
            croft.note(f"no CD-ROM drives; this makes one: croft cdrom add {args.name}")
            return OK
        table = Table(croft.out, ("DRIVE", "BUS", "DISC"))
        for drive in drives:
            medium = drive.get("medium")
            table.add(
                str(drive.get("unit", 0)),
                str(drive.get("bus", "sata")),
                croft.out.clean(medium) if medium else "empty",
            )
        print(table.render(), end="")
        return OK


class Insert(Command):
    """``croft cdrom insert VM ISO``"""

    description = """
        Puts a disc into a CD-ROM drive of a VM, running or not: an ISO 9660 or UDF image, which is
        a file on the daemon's host and stays where it is. It goes into the first empty drive; into
        the only one, or that of --drive, in place of what is in it. The guest sees the change. If
        it uses the disc that is in the drive, unmount that there first.
    """
    examples = (
        ("croft cdrom insert web1 debian-12.iso", "into its drive"),
        ("croft cdrom insert win11 /isos/virtio-win.iso --drive 1", "into its second"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)
        parser.add_argument("iso", metavar="ISO", help="which file")
        _arguments(parser, force="pull out what the guest uses")

    def run(self, croft: Croft, args: Namespace) -> int:
        body = {"path": host_path(croft, args.iso), "force": args.force}
        drive = _choose(croft, args, full=False)
        name = croft.out.clean(os.path.basename(args.iso))
        return _say(croft, args, drive, "insert", body, f"has {name} in drive {drive}")


class Eject(Command):
    """``croft cdrom eject VM``"""

    description = """
        Takes the disc out of a CD-ROM drive of a VM, running or not. A guest that uses the disc has
        locked the drive: it is asked to open it, and many do. With --force the disc is pulled
        out, whatever the guest does with it; that is also for a VM that is suspended.
    """
    examples = (
        ("croft cdrom eject web1", "out of its drive"),
        ("croft cdrom eject web1 --drive 1 --force", "whatever the guest says"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)
        _arguments(parser, force="pull it out, also if the guest uses it")

    def run(self, croft: Croft, args: Namespace) -> int:
        drive = _choose(croft, args, full=True)
        body = {"force": args.force}
        return _say(croft, args, drive, "eject", body, f"has nothing in drive {drive}")


class Add(Command):
    """``croft cdrom add VM``"""

    description = """
        Gives a VM one more CD-ROM drive, four at most. On SATA every system sees it, but it comes
        only while the VM is off; the kernels of many cloud images know only SCSI (virtio-scsi),
        which is the default for VMs that run, or were made from an image.
    """
    examples = (
        ("croft cdrom add web1", "an empty drive"),
        ("croft cdrom add web1 rescue.iso --bus sata", "with a disc in it"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)
        parser.add_argument("iso", metavar="ISO", nargs="?", help="what is in it (nothing)")
        parser.add_argument("-b", "--bus", choices=BUSES, help="how it is attached")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        body: dict[str, Any] = {}
        if args.bus is not None:
            body["bus"] = args.bus
        if args.iso is not None:
            body["path"] = host_path(croft, args.iso)
        return act(
            croft,
            [args.name],
            lambda ref: croft.api.post(f"/v1/vms/{quote(ref)}/cdroms", body),
            lambda task: f"has CD-ROM drive {dig(task, 'status.result.drive', 0)}",
            no_wait=args.no_wait,
        )


class Rm(Command):
    """``croft cdrom rm VM``"""

    description = """
        Takes a CD-ROM drive away from a VM; one on SATA only while it is off. The file that was in
        it stays as it is.
    """
    examples = (("croft cdrom rm web1 --drive 1", "its second drive"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)
        parser.add_argument("--drive", type=int, metavar="N", help="which, if there are several")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        drive = _choose(croft, args)
        return act(
            croft,
            [args.name],
            lambda ref: croft.api.delete(f"/v1/vms/{quote(ref)}/cdroms/{drive}"),
            f"has no CD-ROM drive {drive} any more",
            no_wait=args.no_wait,
        )
