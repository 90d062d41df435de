"""Volumes: the disks of VMs."""

from __future__ import annotations

from undercroft.cli.command import Command, Namespace, Parser, add_names, label
from undercroft.cli.command import size as to_size
from undercroft.cli.errors import OK
from undercroft.cli.output import Table, dig, size
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.context import Croft


class Create(Command):
    """``croft volume create NAME``"""

    description = """
        Makes a disk that belongs to no VM yet: empty, or beginning as an image. It takes room on
        the host only for what is written to it, unless --preallocate takes all of it at once.
    """
    examples = (
        ("croft volume create data1 --size 20G", "an empty one"),
        ("croft volume create root2 --from debian:12", "one that begins as an image"),
        ("croft volume create db --size 50G --preallocate", "with all its room taken now"),
        ("croft volume create safe --size 20G --encrypt", "encrypted, with a key of its own"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="of the volume")
        parser.add_argument("-s", "--size", type=to_size, metavar="SIZE", help="such as 20G")
        parser.add_argument(
            "--from", dest="source", metavar="IMAGE|VOLUME", help="what is on it at first"
        )
        parser.add_argument(
            "--preallocate", action="store_true", help="take all its room on the host now"
        )
        parser.add_argument(
            "--encrypt", action="store_true", help="unreadable for who has only the disk it is on"
        )
        parser.add_argument(
            "--format", choices=("qcow2", "raw"), help="of the file (default: qcow2)"
        )
        parser.add_argument("--datastore", metavar="DATASTORE", help="where it is kept")
        parser.add_argument(
            "-l", "--label", action="append", type=label, metavar="KEY=VALUE", help="a label"
        )
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the task's id"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        names = ("name", "size", "source", "preallocate", "encrypt", "format", "datastore")
        body = {
            name: value for name in names if (value := getattr(args, name)) not in (None, False)
        }
        if args.label:
            body["labels"] = dict(args.label)
        return act(
            croft,
            [args.name],
            lambda ref: croft.api.post("/v1/volumes", body),
            "is there",
            no_wait=args.no_wait,
        )


class Ls(Command):
    """``croft volume ls``"""

    description = """
        Lists the disks of VMs, and those that belong to none: how large a guest sees them, and how
        much of that they take on the host.
    """
    examples = (("croft volume ls", "all disks"),)

    def run(self, croft: Croft, args: Namespace) -> int:
        volumes = list(croft.api.list("/v1/volumes", {"sort": "meta.name"}))
        if croft.json:
            croft.print_json(volumes)
            return OK
        if croft.quiet:
            for volume in volumes:
                print(dig(volume, "meta.name", ""))
            return OK
        if not volumes:
            croft.note(
                "no volumes yet: every VM with a disk has one; croft volume create makes others"
            )
            return OK
        names = {
            noun: {
                dig(item, "meta.id"): dig(item, "meta.name", "")
                for item in croft.api.list(f"/v1/{noun}", {"fields": "meta.id,meta.name"})
            }
            for noun in ("vms", "images", "datastores")
        }
        columns = ("NAME", "STATE", ">SIZE", ">ON HOST", "ENCRYPTED", "VM", "IMAGE", "DATASTORE")
        table = Table(croft.out, columns)
        for volume in volumes:
            vm = dig(volume, "spec.attached") or dig(volume, "spec.vm", "")
            image = dig(volume, "spec.image", "")
            place = dig(volume, "status.datastore", "")
            table.add(
                dig(volume, "meta.name", ""),
                dig(volume, "status.state", ""),
                size(dig(volume, "spec.size")),
                size(dig(volume, "status.allocated")),
                "yes" if dig(volume, "spec.encrypted") else "",
                names["vms"].get(vm, vm),
                names["images"].get(image, image),
                names["datastores"].get(place, place),
            )
        print(table.render(), end="")
        return OK


class Show(Command):
    """``croft volume show VOLUME``"""

    description = "Shows a disk: its size, what it takes on the host, the image beneath it."
    examples = (("croft volume show web1-boot", "the boot disk of web1"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "VOLUME", plural=False)

    def run(self, croft: Croft, args: Namespace) -> int:
        volume = croft.api.get(f"/v1/volumes/{quote(args.name)}")
        if croft.json:
            croft.print_json(volume)
            return OK
        from undercroft.cli.detail import volume_detail

        print(volume_detail(croft, volume), end="")
        return OK


class Rm(Command):
    """``croft volume rm VOLUME…``"""

    description = """
        Removes disks that no VM has, with what is on them. What clones of them, snapshots and
        templates need of them stays.
    """
    examples = (("croft volume rm data1", "remove one"),)

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
            lambda ref: croft.api.delete(f"/v1/volumes/{quote(ref)}"),
            "is removed",
            no_wait=args.no_wait,
        )
