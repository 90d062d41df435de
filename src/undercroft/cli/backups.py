"""Backups: VMs as they were, kept elsewhere."""

from __future__ import annotations

import os
import time

from undercroft.cli.command import Command, Namespace, Parser, add_names
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import Table, ago, dig, fields, local_time, size
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft

VARIABLE = "CROFT_BACKUPS"


def repository(croft: Croft, given: str | None, option: str = "--from DIR") -> str:
    """The directory of a repository, on the daemon's host.

    Raises:
        UsageError: none is named.
    """
    path = given or croft.environ.get(VARIABLE)
    if not path:
        raise UsageError("which directory are the backups in?", f"say {option}, or set {VARIABLE}")
    return path if croft.url is not None else os.path.abspath(path)


def add_from(parser: Parser) -> None:
    """The option that names a repository."""
    parser.add_argument(
        "--from", dest="source", metavar="DIR", help=f"where the backups are (default: {VARIABLE})"
    )


def _no_wait(parser: Parser) -> None:
    parser.add_argument(
        "--no-wait", action="store_true", help="only ask for it; print the task's id"
    )


class Create(Command):
    """``croft backup create VM… --to DIR``"""

    description = """
        Backs VMs up, running or not: all disks as they are at one moment, firmware settings and
        TPM. The guest goes on meanwhile. The first backup reads everything; later ones into the
        same directory read and write only what has changed. Each can be restored by itself.
        Without --quiesce a backup of a running guest is what a power cut would leave. With --to -
        it goes to standard output as one archive.
    """
    examples = (
        ("croft backup create web1 --to /backup/vms", "all of it, or what has changed"),
        ("croft backup create db1 --quiesce --to /backup/vms", "with its file systems in order"),
        ("croft backup create web1 --to - | ssh nas 'cat > web1.backup'", "to another machine"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser)
        parser.add_argument(
            "--to", metavar="DIR", help=f"the directory, on the daemon's host (default: {VARIABLE})"
        )
        parser.add_argument("--full", action="store_true", help="read everything")
        parser.add_argument(
            "--quiesce", action="store_true", help="file systems in order first, by its agent"
        )
        parser.add_argument(
            "--decrypt", action="store_true", help="encrypted disks, too: in the clear"
        )
        parser.add_argument("-d", "--description", default="", metavar="TEXT", help="what for")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        if args.to == "-":
            from undercroft.cli.restore import send

            return send(croft, args)
        from undercroft.cli.power import act

        body = {
            "repository": repository(croft, args.to, "--to DIR"),
            "full": args.full,
            "quiesce": args.quiesce,
            "decrypt": args.decrypt,
            "description": args.description,
        }
        return act(
            croft,
            args.names,
            lambda ref: croft.api.post(f"/v1/vms/{quote(ref)}/backup", body),
            _told,
            no_wait=args.no_wait,
        )


def _told(task: Any) -> str:
    result = dig(task, "status.result", {})
    kind = result.get("kind")
    told = f"is backed up ({kind}): read {size(result.get('read', 0))}, "
    told += f"wrote {size(result.get('written', 0))}: {result.get('backup')}"
    if kind == "compared":
        told += f"\n  everything was read: {result.get('why')}"
    return told


class Ls(Command):
    """``croft backup ls [DIR | --from DIR]``"""

    description = "Lists the backups in a directory, oldest first."
    examples = (
        ("croft backup ls /backup/vms", "all of them"),
        ("croft backup ls /backup/vms --vm web1", "those of one VM"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("directory", nargs="?", metavar="DIR", help=f"(default: {VARIABLE})")
        add_from(parser)
        parser.add_argument("--vm", metavar="VM", help="only those of this VM")

    def run(self, croft: Croft, args: Namespace) -> int:
        if args.directory and args.source:
            raise UsageError("the directory is named twice", "give DIR, or --from DIR")
        path = repository(croft, args.directory or args.source, "DIR")
        params: dict[str, object] = {"repository": path}
        if args.vm:
            params["vm"] = args.vm
        answer = croft.api.get("/v1/backups", params)
        if croft.json:
            croft.print_json(answer["backups"])
            return OK
        for id in answer.get("damaged", ()):
            croft.note(f"the manifest of backup {id} is damaged")
        if croft.quiet:
            for backup in answer["backups"]:
                print(backup["id"])
            return OK
        if not answer["backups"]:
            croft.note("no backups yet: croft backup create VM --to DIR")
            return OK
        columns = ("BACKUP", "VM", "KIND", ">DISKS", ">CHANGED", ">WRITTEN", "AGE", "DESCRIPTION")
        table = Table(croft.out, columns)
        for backup in answer["backups"]:
            table.add(
                backup["id"],
                backup["name"],
                backup["kind"],
                size(sum(disk["size"] for disk in backup["disks"])),
                size(backup["changed"]),
                size(backup["written"]),
                ago(time.time() - backup["created"]),
                backup.get("description", ""),
            )
        print(table.render(), end="")
        return OK


class Show(Command):
    """``croft backup show BACKUP``"""

    description = "Shows a backup: of what, when and how it was made, what it holds."
    examples = (
        ("croft backup show bk-… --from /backup/vms", "one of them"),
        ("croft backup show web1 --from /backup/vms", "the newest of a VM"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("backup", metavar="BACKUP", help="its id, or a VM for its newest")
        add_from(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        params = {"repository": repository(croft, args.source)}
        backup = croft.api.get(f"/v1/backups/{quote(args.backup)}", params)
        if croft.json:
            croft.print_json(backup)
            return OK
        shape = backup.get("shape", {})
        disks = ", ".join(size(disk["size"]) for disk in backup["disks"])
        quiet = "in order (quiesced)" if backup["quiesced"] else "as a power cut leaves them"
        pairs = [
            ("Backup", backup["id"]),
            ("VM", f"{backup['name']} ({backup['vm']})"),
            ("Moment", local_time(backup["created"])),
            ("Kind", backup["kind"] + (f": {backup['why']}" if backup.get("why") else "")),
            ("Compared with", backup.get("parent") or "-"),
            ("File systems", quiet if backup["running"] else "of a VM that was off"),
            ("Disks", disks or "-"),
            ("CPUs, memory", f"{shape.get('cpus', 1)}, {size(shape.get('memory'))}"),
            ("Files", ", ".join(file["name"] for file in backup["files"]) or "-"),
            ("Image", dig(backup, "image.name") or "-"),
            ("Read", size(backup["read"])),
            ("Changed", size(backup["changed"])),
            ("Written", size(backup["written"])),
            ("Description", backup.get("description") or "-"),
        ]
        print(fields(croft.out, pairs), end="")
        return OK


class Verify(Command):
    """``croft backup verify [BACKUP…]``"""

    description = """
        Reads all that backups consist of and compares it with its checksums. Exit code 1 if
        anything is damaged.
    """
    examples = (
        ("croft backup verify --from /backup/vms", "all of them"),
        ("croft backup verify web1 --from /backup/vms", "the newest of one VM"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("backups", nargs="*", metavar="BACKUP", help="ids, or VMs")
        add_from(parser)
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        path = repository(croft, args.source)
        body = {"repository": path, "backups": args.backups}
        return act(
            croft,
            [path],
            lambda _: croft.api.post("/v1/backups/verify", body),
            _verified,
            no_wait=args.no_wait,
        )


def _verified(task: Any) -> str:
    count = dig(task, "status.result.verified", 0)
    return f"is as it was: {count} backup{'' if count == 1 else 's'} verified"


class Rm(Command):
    """``croft backup rm BACKUP…``"""

    description = """
        Removes backups. All others stay whole, also those that were made after them; what only they
        needed is freed.
    """
    examples = (("croft backup rm bk-… --from /backup/vms", "remove one"),)

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("backups", nargs="+", metavar="BACKUP", help="ids")
        add_from(parser)
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        params = {"repository": repository(croft, args.source)}
        return act(
            croft,
            args.backups,
            lambda id: croft.api.delete(f"/v1/backups/{quote(id)}", params),
            _freed,
            no_wait=args.no_wait,
        )


def _freed(task: Any) -> str:
    removed = ", ".join(dig(task, "status.result.removed", ()))
    freed = size(dig(task, "status.result.freed", 0))
    return f"no longer has {removed}; {freed} were freed"


class Prune(Command):
    """``croft backup prune --keep N``"""

    description = """
        Removes the backups of each VM but the newest N (--keep), and the newest one of each of so
        many days, weeks and months. What several rules keep counts for each of them.
    """
    examples = (
        ("croft backup prune --keep 7 --from /backup/vms", "the newest seven of each VM"),
        ("croft backup prune --keep-daily 7 --keep-weekly 4 --dry-run", "what would be removed"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("--keep", type=int, default=0, metavar="N", help="the newest N")
        for name in ("daily", "weekly", "monthly"):
            parser.add_argument(
                f"--keep-{name}", type=int, default=0, metavar="N", help=f"the newest {name} ones"
            )
        parser.add_argument("--vm", metavar="VM", help="only those of this VM")
        parser.add_argument("-n", "--dry-run", action="store_true", help="only tell")
        add_from(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.progress import report_failures, wait

        body = {
            "repository": repository(croft, args.source),
            "last": args.keep,
            "daily": args.keep_daily,
            "weekly": args.keep_weekly,
            "monthly": args.keep_monthly,
            "vm": args.vm,
            "dry_run": args.dry_run,
        }
        before = croft.api.get("/v1/backups", {"repository": body["repository"]})["backups"]
        about = {
            backup["id"]: f" ({backup['name']}, {ago(time.time() - backup['created'])} old)"
            for backup in before
        }
        answer = croft.api.post("/v1/backups/prune", body)
        code = OK
        if answer.get("task"):
            (task,) = wait(croft, [answer["task"]])
            answer["task"] = task
            code = report_failures(croft, [task])
        if croft.json:
            croft.print_json(answer)
            return code
        if code == OK:
            told = "would be removed" if args.dry_run else "is removed"
            if not answer["backups"]:
                croft.note("all of them are kept")
            for id in answer["backups"]:
                croft.say(f"{id}{about.get(id, '')} {told}")
            if answer.get("task"):
                croft.say(f"{size(dig(answer['task'], 'status.result.freed', 0))} were freed")
        return code
