"""Volumes: the disks of VMs."""

from __future__ import annotations

from undercroft.cli.command import Command, Namespace, Parser, add_names
from undercroft.cli.errors import OK
from undercroft.cli.output import Table, dig, size
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.context import Croft


class Ls(Command):
    """``croft volume ls``"""

    description = """
        Lists the disks of VMs: how large the guest sees them, and how much of that they take on the
        host. They come and go with their VMs.
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
            croft.note("no volumes yet: every VM with a disk has one")
            return OK
        names = {
            noun: {
                dig(item, "meta.id"): dig(item, "meta.name", "")
                for item in croft.api.list(f"/v1/{noun}", {"fields": "meta.id,meta.name"})
            }
            for noun in ("vms", "images")
        }
        table = Table(croft.out, ("NAME", "STATE", ">SIZE", ">ON HOST", "VM", "IMAGE"))
        for volume in volumes:
            vm, image = dig(volume, "spec.vm", ""), dig(volume, "spec.image", "")
            table.add(
                dig(volume, "meta.name", ""),
                dig(volume, "status.state", ""),
                size(dig(volume, "spec.size")),
                size(dig(volume, "status.allocated")),
                names["vms"].get(vm, vm),
                names["images"].get(image, image),
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
