"""This host: what it is, and whether everything on it is in order."""

from __future__ import annotations

import time

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import FAILED, OK
from undercroft.cli.output import ago, dig, fields, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft


class Show(Command):
    """``croft host show``"""

    description = """
        Shows the host: its QEMU, which accelerators truly work and why the others do not, room, and
        whatever is not as it should be.
    """
    examples = (("croft host show", "for people"), ("croft host show --json", "for programs"))

    def run(self, croft: Croft, args: Namespace) -> int:
        host = croft.api.get("/v1/hosts/self")
        if croft.json:
            croft.print_json(host)
            return OK
        if not dig(host, "status.hostname"):
            croft.note("the daemon has only just begun and still looks at this host; ask again")
            return OK
        print(_detail(croft, host), end="")
        return OK


def _detail(croft: Croft, host: Any) -> str:
    style = croft.out
    status = host.get("status", {})
    accelerators = []
    for one in status.get("accelerators", ()):
        can = style.paint("works", "green") if one.get("available") else style.paint("no", "yellow")
        accelerators.append(f"{one.get('name')}: {can}, {style.clean(one.get('reason', ''))}")
    room = f"{size(status.get('disk_free'))} free of {size(status.get('disk_total'))}"
    pairs = [
        ("system", f"{status.get('os')}, Linux {status.get('kernel')}"),
        ("cpus", f"{status.get('cpus')} × {status.get('cpu_model')}"),
        ("memory", size(status.get("memory"))),
        ("data", f"{status.get('data')} ({room})"),
        ("qemu", str(status.get("qemu") or "missing")),
        ("guests", ", ".join(status.get("architectures", ()))),
        ("firmware", ", ".join(status.get("firmware", ()))),
        ("cgroups", str(status.get("cgroup", ""))),
        ("runs as", "root" if status.get("privileged") else "an ordinary user"),
        (
            "undercroft",
            f"{status.get('version')}, up {ago(time.time() - status.get('started', 0))}",
        ),
        ("id", dig(host, "meta.id", "")),
    ]
    text = fields(style, [(a, b) for a, b in pairs if b])
    width = max(len(a) for a, b in pairs if b)
    for number, line in enumerate(accelerators):
        name = "runs with" if number == 0 else ""
        text += f"{style.paint(name.ljust(width), 'dim')}  {line}\n"
    for number, problem in enumerate(status.get("problems", ())):
        name = "problems" if number == 0 else ""
        line = style.paint(style.clean(problem), "yellow")
        text += f"{style.paint(name.ljust(width), 'dim')}  {line}\n"
    head = style.paint(status.get("hostname") or dig(host, "meta.name", ""), "bold")
    return f"{head}\n" + "".join(f"  {line}\n" for line in text.splitlines())


class Check(Command):
    """``croft host check``"""

    description = """
        Looks for what does not belong: processes, files and records that a crash left behind,
        volumes that are damaged. It changes nothing unless --repair is given. Exit code 1 if
        something remains that is not in order.
    """
    examples = (
        ("croft host check", "look"),
        ("croft host check --repair", "look, and put right what can be"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("--repair", action="store_true", help="put right what can be")

    def run(self, croft: Croft, args: Namespace) -> int:
        report = croft.api.post("/v1/hosts/self/check", {"repair": args.repair})
        return print_report(croft, report, args.repair, "croft host check --repair")


def print_report(croft: Croft, report: Any, repair: bool, remedy: str) -> int:
    """Prints what was found; the exit code. ``remedy``: the command that puts it right."""
    findings = report.get("findings", ())
    left = [finding for finding in findings if not finding.get("repaired")]
    if croft.json:
        croft.print_json(report)
        return FAILED if left else OK
    style = croft.out
    for finding in findings:
        done = finding.get("repaired")
        mark = style.paint("repaired", "green") if done else style.paint("found", "yellow")
        print(f"{mark}  {style.clean(finding.get('message', ''))} ({finding.get('code')})")
        if path := finding.get("path"):
            print(f"          {style.clean(path)}")
    checked = ", ".join(
        f"{count} {what.removesuffix('s') if count == 1 else what}"
        for what, count in report.get("checked", {}).items()
    )
    if not findings:
        croft.say(f"{style.paint('all is in order', 'green')} ({checked} checked)")
    elif left and not repair:
        croft.say(f"put it right with: {remedy}")
    return FAILED if left else OK
