"""Making VMs of backups."""

from __future__ import annotations

import os
import sys

from undercroft.cli.backups import add_from, repository
from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import dig, local_time, size
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft


class Restore(Command):
    """``croft backup restore BACKUP [--as NAME | --over VM --force]``"""

    description = """
        Makes a new VM of a backup, or makes one what it was. It fails if anything of the backup is
        damaged; nothing is left of it then. With --over the VM goes on until all is read, and loses
        what it has become since.
    """
    examples = (
        ("croft backup restore web1 --from /backup/vms", "the newest, under its own name"),
        ("croft backup restore bk-… --as web2 --start", "as a new VM, switched on"),
        ("croft backup restore web1 --over web1 --force", "back to what it was"),
        ("ssh nas 'cat web1.backup' | croft backup restore - --as web2", "from another machine"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "backup", metavar="BACKUP", help="its id, or a VM for its newest; -: from a pipe"
        )
        add_from(parser)
        parser.add_argument("--as", dest="name", metavar="NAME", help="the new VM's name")
        parser.add_argument("--datastore", metavar="DATASTORE", help="for the new VM's disks")
        parser.add_argument("--over", metavar="VM", help="make this VM what it was")
        parser.add_argument(
            "-f", "--force", action="store_true", help="with --over: it loses what it is now"
        )
        parser.add_argument("-s", "--start", action="store_true", help="switch it on afterwards")
        parser.add_argument(
            "--damaged", action="store_true", help="what is left of it, with zeroes for the rest"
        )
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the task's id"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        if args.name and args.over:
            raise UsageError("--as makes a new VM, --over changes one", "give one of them")
        body: dict[str, Any] = {
            **_source(croft, args),
            "name": args.name,
            "over": args.over,
            "force": args.force,
            "start": args.start,
            "datastore": args.datastore,
            "damaged": args.damaged,
        }
        return act(
            croft,
            [args.backup],
            lambda _: croft.api.post("/v1/backups/restore", body),
            lambda task: _told(task, over=bool(args.over)),
            no_wait=args.no_wait,
        )


def _told(task: Any, *, over: bool) -> str:
    asked = dig(task, "spec.arguments", {})
    what = str(asked.get("backup", "the backup"))
    if moment := asked.get("moment"):
        what += f" ({local_time(moment)})"
    if not over:
        return f"is restored from {what}"
    off = f", switched off: croft start {dig(task, 'spec.object.name')}" if asked.get("off") else ""
    return f"is as it was in {what}{off}"


def _source(croft: Croft, args: Namespace) -> dict[str, Any]:
    if args.backup != "-":
        _no_file(args.backup)
        return {"repository": repository(croft, args.source), "backup": args.backup}
    from undercroft.cli.sending import Pipe
    from undercroft.cli.sending import send as upload

    if sys.stdin.isatty():
        raise UsageError("a backup comes through a pipe", "croft backup restore - < web1.backup")
    pipe = Pipe(sys.stdin.fileno())
    upload(croft, "send the backup", pipe)
    return {"upload": pipe.key}


def _no_file(backup: str) -> None:
    """Does nothing with what can be a backup's id or a VM's name.

    Raises:
        UsageError: it is a file or directory.
    """
    if "/" not in backup and not (backup.endswith(".backup") and os.path.isfile(backup)):
        return
    if os.path.isdir(backup):
        raise UsageError(
            f"{backup} is a directory: which backup in it?",
            f"croft backup restore BACKUP --from {backup}; see: croft backup ls {backup}",
        )
    raise UsageError(
        f"{backup} is the name of a file, not a backup's id", f"croft backup restore - < {backup}"
    )


def send(croft: Croft, args: Namespace) -> int:
    """Backs a VM up to standard output."""
    if len(args.names) != 1:
        raise UsageError("one VM goes through a pipe", "name one, or a directory for several")
    if sys.stdout.isatty():
        raise UsageError(
            "a backup is nothing for a terminal", "croft backup create VM --to - > FILE"
        )
    import json

    from undercroft.cli.transfer import shown

    (name,) = args.names
    names = ("quiesce", "description", "decrypt")
    body = {given: getattr(args, given) for given in names}
    response = croft.api.request(
        "POST",
        f"/v1/vms/{quote(name)}/backup/stream",
        headers={"content-type": "application/json"},
        body=json.dumps(body).encode(),
        timeout=600.0,
    )
    with shown(croft, f"back up {name}", None, 0) as count:
        sent = 0
        for piece in count(response.chunks()):
            sys.stdout.buffer.write(piece)
            sent += len(piece)
    sys.stdout.buffer.flush()
    croft.note(f"{name} is backed up: {size(sent)}")
    return OK
