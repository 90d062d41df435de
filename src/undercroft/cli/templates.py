"""Templates: frozen VMs to make others from."""

from __future__ import annotations

import time

from undercroft.cli.command import Command, Namespace, Parser, add_names
from undercroft.cli.errors import OK
from undercroft.cli.output import Table, ago, dig, size
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.context import Croft


class Create(Command):
    """``croft template create NAME --from VM``"""

    description = """
        Keeps what a VM is now, to make others from: croft clone NAME. The VM goes on. With --memory
        they do not boot but go on from where it is: let it settle first, and leave nothing in it
        that only one machine may have (open connections, secrets).
    """
    examples = (
        ("croft template create debian-web --from web1", "what is on its disks"),
        ("croft template create debian-warm --from web1 --memory", "and in its memory"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="of the template, perhaps with a :tag")
        parser.add_argument(
            "--from", dest="source", required=True, metavar="VM", help="name or id of the VM"
        )
        parser.add_argument("-m", "--memory", action="store_true", help="also what is in memory")
        parser.add_argument(
            "--quiesce", action="store_true", help="file systems in order first, by its agent"
        )
        parser.add_argument("-d", "--description", default="", metavar="TEXT", help="what for")
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the task's id"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        names = ("name", "source", "description", "memory", "quiesce")
        body = {name: getattr(args, name) for name in names}
        return act(
            croft,
            [args.source],
            lambda ref: croft.api.post("/v1/templates", body),
            f"is kept in template {args.name}",
            no_wait=args.no_wait,
        )


class Ls(Command):
    """``croft template ls``"""

    description = "Lists templates."
    examples = (("croft template ls", "all templates"),)

    def run(self, croft: Croft, args: Namespace) -> int:
        found = list(croft.api.list("/v1/templates", {"sort": "meta.name"}))
        if croft.json:
            croft.print_json(found)
            return OK
        if croft.quiet:
            for template in found:
                print(dig(template, "meta.name", ""))
            return OK
        if not found:
            croft.note("no templates yet: croft template create NAME --from VM")
            return OK
        images = {
            dig(item, "meta.id"): dig(item, "meta.name", "")
            for item in croft.api.list("/v1/images", {"fields": "meta.id,meta.name"})
        }
        table = Table(croft.out, ("NAME", "STATE", ">CPUS", ">RAM", ">KEPT", "IMAGE", "AGE"))
        for template in found:
            memory = dig(template, "status.memory", 0)
            image = dig(template, "status.shape.image", "") or ""
            table.add(
                dig(template, "meta.name", ""),
                dig(template, "status.state", ""),
                str(dig(template, "status.shape.cpus", "")),
                size(dig(template, "status.shape.memory")),
                size(memory) if memory else "-",
                images.get(image, image),
                ago(time.time() - dig(template, "meta.created", 0)),
            )
        print(table.render(), end="")
        return OK


class Show(Command):
    """``croft template show TEMPLATE``"""

    description = "Shows a template: what it was made from, what VMs made from it begin with."
    examples = (("croft template show debian-warm", "everything about one"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "TEMPLATE", plural=False)

    def run(self, croft: Croft, args: Namespace) -> int:
        template = croft.api.get(f"/v1/templates/{quote(args.name)}")
        if croft.json:
            croft.print_json(template)
            return OK
        from undercroft.cli.detail import template_detail

        print(template_detail(croft, template), end="")
        return OK


class Rm(Command):
    """``croft template rm TEMPLATE…``"""

    description = "Removes templates. VMs that were made from them keep what they need of them."
    examples = (("croft template rm debian-warm", "remove one"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "TEMPLATE")

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.errors import ours, report

        code = OK
        gone = []
        for name in dict.fromkeys(args.names):
            try:
                gone.append(croft.api.delete(f"/v1/templates/{quote(name)}"))
            except Exception as error:
                known = ours(error)
                if known is None or known.code == "daemon":
                    raise
                code = report(croft, known) or code
                continue
            croft.say(f"template {name} is removed")
        if croft.json:
            croft.print_json(gone)
        return code
