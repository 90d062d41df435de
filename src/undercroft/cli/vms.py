"""Looking at VMs, changing and removing them."""

from __future__ import annotations

from undercroft.cli.command import Command, Namespace, Parser, add_names, duration, label, size
from undercroft.cli.errors import OK, UsageError, ours, report
from undercroft.cli.output import Table, dig, plain
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft

_LEAN = (
    "meta.name",
    "status.state",
    "spec.cpus",
    "spec.memory",
    "spec.image",
    "spec.ports",
    "status.addresses",
    "status.instance.started",
)


class Ls(Command):
    """``croft ls``"""

    description = """
        Lists all VMs, running or not. With --quiet only their names, to be used in other commands.
        A filter compares fields of what croft show --json prints: == != < <= > >=, and ~ for
        patterns with *; several with commas between them.
    """
    examples = (
        ("croft ls", "all VMs"),
        ("croft ls web*", "those whose name begins with web"),
        ("croft ls --state running --label env=prod", "by state and label"),
        ("croft ls --filter 'spec.memory>=1G'", "by any field"),
        ("croft stop $(croft ls -q --state running)", "stop whatever runs"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "pattern", nargs="?", metavar="PATTERN", help="only names like this: web*"
        )
        parser.add_argument("--state", help="only VMs in this state")
        parser.add_argument(
            "-l",
            "--label",
            action="append",
            type=label,
            default=[],
            metavar="KEY=VALUE",
            help="only VMs with this label",
        )
        parser.add_argument("--filter", metavar="EXPR", help="only VMs for which this is true")
        parser.add_argument(
            "--sort",
            metavar="FIELD",
            default="meta.name",
            help="order: name (default), created, or any field",
        )
        parser.add_argument("-r", "--reverse", action="store_true", help="the other way round")

    def run(self, croft: Croft, args: Namespace) -> int:
        terms = [args.filter] if args.filter else []
        if args.pattern:
            terms.append(f"meta.name~{args.pattern}")
        if args.state:
            terms.append(f"status.state=={args.state}")
        terms += [f"meta.labels.{key}=={value}" for key, value in args.label]
        sort = {"name": "meta.name", "created": "meta.created"}.get(args.sort, args.sort)
        params: dict[str, object] = {
            "filter": ",".join(terms) or None,
            "sort": f"-{sort}" if args.reverse else sort,
        }
        if croft.json:
            croft.print_json(list(croft.api.list("/v1/vms", params)))
            return OK
        if croft.quiet:
            for vm in croft.api.list("/v1/vms", {**params, "fields": "meta.name"}):
                print(dig(vm, "meta.name", ""))
            return OK
        vms = list(croft.api.list("/v1/vms", {**params, "fields": _LEAN}))
        if not vms:
            croft.note("no VMs" + (" like that" if terms else " yet: croft run tiny makes one"))
            return OK
        print(self._table(croft, vms), end="")
        return OK

    def _table(self, croft: Croft, vms: list[Any]) -> str:
        import time

        from undercroft.cli.output import ago
        from undercroft.cli.output import size as text

        images = image_names(croft)
        sizes: dict[int, str] = {}
        now = time.time()
        table = Table(
            croft.out,
            ("NAME", "STATE", ">CPUS", ">MEMORY", "IMAGE", "ADDRESS", "PORTS", "UPTIME"),
        )
        for vm in vms:
            spec, status = vm["spec"], vm["status"]
            memory, image, instance = spec["memory"], spec["image"], status["instance"]
            if memory not in sizes:
                sizes[memory] = text(memory)
            table.add(
                vm["meta"]["name"],
                status["state"],
                str(spec["cpus"]),
                sizes[memory],
                images.get(image, image) if image else "",
                ", ".join(status["addresses"][:2]),
                ", ".join([port_text(croft, f) for p in spec["ports"] for f in p["forwards"]]),
                ago(now - instance["started"]) if instance else "",
            )
        return table.render()


def image_names(croft: Croft) -> dict[str, str]:
    """Names of images by id."""
    found = croft.api.list("/v1/images", {"fields": "meta.id,meta.name"})
    return {dig(image, "meta.id", ""): dig(image, "meta.name", "") for image in found}


def forwards(vm: Any) -> list[Any]:
    """All forwarded ports of a VM."""
    return [f for port in dig(vm, "spec.ports", ()) for f in port.get("forwards") or ()]


def port_text(croft: Croft, forward: Any, address: bool = False) -> str:
    """A forwarded port as people write it: ``8080→80``."""
    host = forward.get("host_address", "127.0.0.1")
    front = f"{host}:" if address or host != "127.0.0.1" else ""
    protocol = forward.get("protocol", "tcp")
    back = "" if protocol == "tcp" else f"/{protocol}"
    return f"{front}{forward.get('host_port')}{croft.out.arrow}{forward.get('guest_port')}{back}"


class Show(Command):
    """``croft show VM…``"""

    description = """
        Shows what a VM should be and what it is: shape, disks, ports, addresses, how its last run
        ended. With --json the whole object as the API has it, with --field one value of it.
    """
    examples = (
        ("croft show web1", "for people"),
        ("croft show web1 --json", "for programs"),
        ("croft show web1 --field status.instance.pid", "for scripts"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser)
        parser.add_argument(
            "--field", metavar="PATH", help="only this of what --json prints; nothing if unset"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        code = OK
        found = []
        for ref in args.names:
            try:
                found.append(croft.api.get(f"/v1/vms/{quote(ref)}"))
            except Exception as error:
                known = ours(error)
                if known is None or known.code == "daemon":
                    raise
                code = report(croft, known) or code
        if args.field is not None:
            for vm in found:
                print(plain(dig(vm, args.field)))
            return code
        if croft.json:
            croft.print_json(found[0] if len(args.names) == 1 and found else found)
            return code
        from undercroft.cli.detail import vm_detail

        print("\n".join(vm_detail(croft, vm) for vm in found), end="")
        return code


class Set(Command):
    """``croft set VM``"""

    description = """
        Changes what a VM should be. CPUs, memory and the like take effect when it is started the
        next time (croft restart); name and labels at once. What is not mentioned stays as it is.
    """
    examples = (
        ("croft set web1 --cpus 4 --memory 2G", "from the next start on"),
        ("croft set web1 --publish 8080:80 --publish 8443:443", "all forwarded ports, anew"),
        ("croft set web1 --name web-old", "rename"),
        ("croft set web1 --label env=prod --label owner=", "set one label, remove another"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)
        parser.add_argument("--name", dest="new_name", metavar="NEW", help="another name")
        parser.add_argument("--cpus", type=int, metavar="N", help="virtual CPUs")
        parser.add_argument("--memory", type=size, metavar="SIZE", help="memory: 2G")
        parser.add_argument(
            "--publish",
            "-p",
            action="append",
            metavar="[ADDR:]HOST:GUEST",
            help="forwarded ports; replaces those there are (SSH's is kept)",
        )
        parser.add_argument(
            "--restart", choices=("never", "on-failure", "always"), help="start again by itself?"
        )
        parser.add_argument(
            "--stop-timeout", type=duration, metavar="TIME", help="how long croft stop waits"
        )
        parser.add_argument("--display", choices=("none", "std", "virtio"), help="graphics adapter")
        parser.add_argument("--boot", choices=("disk", "cdrom"), help="what is tried first")
        parser.add_argument("--accelerator", choices=("auto", "kvm", "tcg"), help="how it runs")
        parser.add_argument("--cpu-model", metavar="MODEL", help="CPU model of QEMU")
        parser.add_argument("--kernel-arguments", metavar="TEXT", help="added at direct boot")
        parser.add_argument(
            "-l",
            "--label",
            action="append",
            type=label,
            metavar="KEY=VALUE",
            help="set a label; without VALUE remove it",
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        path = f"/v1/vms/{quote(args.name)}"
        names = (
            "cpus",
            "memory",
            "restart",
            "stop_timeout",
            "display",
            "boot",
            "accelerator",
            "cpu_model",
            "kernel_arguments",
        )
        change: dict[str, object] = {
            n: getattr(args, n) for n in names if getattr(args, n) is not None
        }
        if args.new_name is not None:
            change["name"] = args.new_name
        before = None
        if args.label or args.publish:
            before = croft.api.get(path)
        if args.label:
            labels = {**dig(before, "meta.labels", {}), **dict(args.label)}
            change["labels"] = {key: value for key, value in labels.items() if value}
        if args.publish:
            from undercroft.cli.ports import parse_forwards

            wanted = parse_forwards(args.publish)
            if not any(f["guest_port"] == 22 for f in wanted):
                wanted += [f for f in forwards(before) if f.get("guest_port") == 22]
            change["forwards"] = wanted
        if not change:
            raise UsageError("nothing to change", "say what: croft set --help")
        vm = croft.api.patch(path, change)
        if croft.json:
            croft.print_json(vm)
            return OK
        name = dig(vm, "meta.name")
        later = set(change) - {"name", "labels", "restart", "stop_timeout"}
        if later and dig(vm, "status.instance") is not None:
            croft.say(f"{name} is changed; it takes effect with: croft restart {name}")
        else:
            croft.say(f"{name} is changed")
        return OK


class Rm(Command):
    """``croft rm VM…``"""

    description = """
        Removes VMs and their disks for good. One that runs is refused unless --force is given.
    """
    examples = (
        ("croft rm web1", "remove one that is stopped"),
        ("croft rm --force web1 web2", "switch off and remove"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser)
        parser.add_argument("-f", "--force", action="store_true", help="also those that run")
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the task's id"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        return act(
            croft,
            args.names,
            lambda ref: croft.api.delete(
                f"/v1/vms/{quote(ref)}", {"force": True} if args.force else None
            ),
            "is removed",
            no_wait=args.no_wait,
        )
