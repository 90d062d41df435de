"""Exporting VMs and disks into files here."""

from __future__ import annotations

import glob
import os
import sys
import time

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import OK, Interrupted, UsageError, ours
from undercroft.cli.output import dig, elapsed, size
from undercroft.cli.progress import report_failures, wait
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from undercroft.cli.context import Croft

_FORMATS = ("ova", "ovf", "raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi")
_SUFFIXES = {"img": "raw", "vpc": "vhd"}
_KINDS = ("streamOptimized", "monolithicSparse", "monolithicFlat")
_GONE = 30.0  # seconds for which the daemon may be away while we fetch
_PIECE = 1 << 20


class Export(Command):
    """``croft export VM [FILE]``"""

    description = """
        Writes a VM, one of its snapshots, or a template into a file for VMware, VirtualBox,
        virt-v2v or another croft: all of it as OVA (or as OVF with its files beside it), or one
        disk in the format that the file's name tells. A VM that runs goes on; it is exported as it
        is at one moment. A transfer that was cut off goes on where it stopped when the same command
        is given again.
    """
    examples = (
        ("croft export web1", "the whole VM, as web1.ova"),
        ("croft export web1 /srv/web1.ovf", "descriptor, manifest and disks side by side"),
        ("croft export web1 disk.qcow2", "its first disk"),
        ("croft export web1 data.vmdk --disk 1 --vmdk monolithicSparse", "its second"),
        ("croft export web1 old.ova --snapshot before-upgrade", "what it was then"),
        ("croft export web1 - | ssh other croft import - --name web1", "to another host"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("vm", metavar="VM", help="name or id of a VM or template")
        parser.add_argument("file", metavar="FILE", nargs="?", help="(default: NAME.ova); - a pipe")
        parser.add_argument("--format", choices=_FORMATS, help="(default: as FILE is called)")
        parser.add_argument("--vmdk", choices=_KINDS, help="kind of a VMDK")
        parser.add_argument("--disk", type=int, metavar="N", help="which disk; 0 is the first")
        parser.add_argument("--snapshot", metavar="SNAPSHOT", help="one of its snapshots")
        parser.add_argument(
            "--quiesce", action="store_true", help="its file systems in order first"
        )
        parser.add_argument("--sha256", action="store_true", help="say the checksums in any case")
        parser.add_argument("-f", "--force", action="store_true", help="replace FILE")

    def run(self, croft: Croft, args: Namespace) -> int:
        begun = time.monotonic()
        format = args.format or _format_of(args.file)
        target = args.file or f"{args.vm}.{format}"
        piped = target == "-"
        if piped and (format == "ovf" or args.vmdk == "monolithicFlat"):
            raise UsageError("several files do not go through a pipe", "use --format ova")
        body = _request(args, format, target)
        from undercroft.cli.sending import is_ours

        # What is taken from where it lies does not have to be compared.
        body["checksums"] = args.sha256 or piped or croft.url is not None or not is_ours(croft.data)
        export = None if piped else _unfinished(croft, target, body, args.vm)
        if export is None or dig(export, "status.state") != "ready":
            if export is not None:
                task = croft.api.get(f"/v1/tasks/{quote(export['tasks'][0])}")
            else:
                if not piped:
                    _check_target(target, args.force)
                task = _ask(croft, args.vm, body)
            id = str(dig(task, "spec.object.id"))
            try:
                task = wait(croft, [task])[0]
            except Interrupted:
                _leave(croft, target, body, id)
                raise
            if code := report_failures(croft, [task]):
                return code
            export = croft.api.get(f"/v1/exports/{quote(id)}")
        files = _fetch(croft, export, target)
        _forget(target, body, export["meta"]["id"])
        croft.api.delete(f"/v1/exports/{quote(export['meta']['id'])}")
        _tell(croft, export, files, time.monotonic() - begun, piped)
        return OK


def _format_of(file: str | None) -> str:
    if file is None or file == "-":
        return "ova"
    suffix = os.path.splitext(file)[1].lower().removeprefix(".")
    suffix = _SUFFIXES.get(suffix, suffix)
    if suffix not in _FORMATS:
        raise UsageError(
            f"{file} does not tell the format",
            f"call it FILE.ova, FILE.qcow2, …, or add --format ({', '.join(_FORMATS)})",
        )
    return suffix


def _request(args: Namespace, format: str, target: str) -> dict[str, Any]:
    names = ("vmdk", "disk", "snapshot")
    body: dict[str, Any] = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    body["format"] = format
    if args.quiesce:
        body["quiesce"] = True
    if args.disk is not None and format in ("ova", "ovf"):
        raise UsageError(f"an {format} holds all disks", "leave --disk out, or choose a format")
    if target != "-":
        import re

        stem = os.path.splitext(os.path.basename(target))[0]
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:64].strip("-._")
        if stem:
            body["file"] = stem
    return body


def _check_target(target: str, force: bool) -> None:
    if os.path.isdir(target):
        raise UsageError(
            f"{target} is a directory", f"name the file: {target.rstrip('/')}/web1.ova"
        )
    directory = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(directory):
        raise UsageError(f"there is no directory {directory}", f"make it: mkdir -p {directory}")
    if os.path.exists(target) and not force:
        raise UsageError(f"{target} exists", "choose another name, or add --force")


def _ask(croft: Croft, source: str, body: dict[str, Any]) -> Any:
    """The task; the source is a VM, or else a template."""
    if source.startswith("tpl-"):
        return croft.api.post("/v1/exports", {"template": source, **body})
    try:
        return croft.api.post("/v1/exports", {"vm": source, **body})
    except Exception as error:
        known = ours(error)
        if known is None or known.code != "not-found" or "snapshot" in body:
            raise
        missing = error
    try:
        return croft.api.post("/v1/exports", {"template": source, **body})
    except Exception as error:
        known = ours(error)
        if known is None or known.code != "not-found":
            raise
        raise missing from None


def _part(target: str, name: str, id: str) -> str:
    """Where a file is until it is whole."""
    return os.path.join(os.path.dirname(os.path.abspath(target)), f".{name}.{id}.part")


def _leave(croft: Croft, target: str, body: dict[str, Any], id: str) -> None:
    """Sees to it that the same command finds an export that goes on without this one."""
    import shlex

    if target == "-" or "file" not in body:
        croft.note("nothing of it was written here, and the same command begins anew")
        return
    with open(_part(target, f"{body['file']}.{body['format']}", id), "ab"):
        pass
    croft.note(f"{target} is not written yet; when it is done, the same command fetches it:")
    croft.note(f"  {croft.err.paint(shlex.join(['croft', *sys.argv[1:]]), 'cyan')}")


def _forget(target: str, body: dict[str, Any], id: str) -> None:
    """Removes what marked an export as unfinished, once its files are here."""
    stem = body.get("file")
    if target == "-" or stem is None:
        return
    for path in glob.glob(_part(glob.escape(target), f"{glob.escape(str(stem))}[.-]*", id)):
        os.unlink(path)


def _unfinished(croft: Croft, target: str, body: dict[str, Any], vm: str) -> Any | None:
    """The export that an earlier call of the same has begun to fetch or has not waited for, if it
    is still there."""
    stem = body.get("file")
    if stem is None:
        return None
    from undercroft.model.names import is_id

    source = str(body.get("snapshot", vm))
    for path in glob.glob(_part(glob.escape(target), f"{glob.escape(str(stem))}[.-]*", "exp-*")):
        id = path.removesuffix(".part").rpartition(".")[2]
        try:
            export = croft.api.get(f"/v1/exports/{quote(id)}")
        except Exception as error:
            known = ours(error)
            if known is None or known.code != "not-found":
                raise
            os.unlink(path)  # it cannot go on
            continue
        spec = export["spec"]
        same = spec["format"] == body["format"] and spec["disk"] == body.get("disk", 0)
        # The export knows its source by name; an id does not tell that.
        same = same and (is_id(source) or spec["source"].endswith(f" {source}"))
        if same and (dig(export, "status.state") == "ready" or dig(export, "tasks")):
            croft.note(f"going on with what was begun {_ago(export)} ago")
            return export
    return None


def _ago(export: Any) -> str:
    return elapsed(max(time.time() - dig(export, "meta.created", 0), 0))


def _fetch(croft: Croft, export: Any, target: str) -> list[dict[str, Any]]:
    """Brings the files here; each is there under its name when all are whole."""
    id = export["meta"]["id"]
    files = dig(export, "status.files")
    if target == "-":
        for piece in _pieces(croft, id, files[0], 0):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return [{**files[0], "path": "-"}]
    found = []
    for index, file in enumerate(files):
        part = _part(target, file["name"], id)
        if not _linked(croft, file, part):
            try:
                _receive(croft, id, file, part)
            except OSError as error:
                _raise_full(error, target)
                raise
        own = target
        if len(files) > 1 and index:
            own = os.path.join(os.path.dirname(os.path.abspath(target)), file["name"])
        found.append({**file, "part": part, "path": own})
    for one in found:
        os.replace(one.pop("part"), one["path"])
    return found


def _linked(croft: Croft, file: Any, part: str) -> bool:
    """Whether the file could simply be taken: it is on this host, ours, on the same disk."""
    if croft.url is not None:
        return False
    try:
        if os.stat(file["path"]).st_uid != os.geteuid():
            return False
        if os.path.exists(part):
            os.unlink(part)
        os.link(file["path"], part)
        os.chmod(part, 0o666 & ~_umask())
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _raise_full(error: OSError, target: str) -> None:
    """Says what to do if the disk is full that a file goes to."""
    import errno

    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return
    from undercroft.model.errors import NoSpaceError

    directory = os.path.dirname(os.path.abspath(target))
    raise NoSpaceError(
        f"there is no room for {target}: the disk that holds {directory} is full",
        object=target,
        action="make room there, then give the same command again: it goes on where it stopped",
    ) from error


def _receive(croft: Croft, id: str, file: Any, part: str) -> None:
    """Fetches what is not there yet, and compares the checksum of all."""
    import hashlib

    from undercroft.cli.transfer import shown

    digest = hashlib.sha256()
    with open(part, "ab+") as here:
        here.seek(0)
        while piece := here.read(_PIECE):
            digest.update(piece)
        done = here.tell()
        with shown(croft, file["name"], file["size"], done) as count:
            for piece in count(_pieces(croft, id, file, done)):
                here.write(piece)
                digest.update(piece)
    if file["sha256"] and digest.hexdigest() != file["sha256"]:
        from undercroft.model.errors import ChecksumError

        os.unlink(part)
        raise ChecksumError(
            f"what arrived of {file['name']} is not what was sent: its SHA-256 is "
            f"{digest.hexdigest()}, not {file['sha256']}",
            action="export it again",
        )


def _pieces(croft: Croft, id: str, file: Any, start: int) -> Iterator[bytes]:
    """The file from a byte on, also if the daemon is restarted meanwhile."""
    deadline: float | None = None
    path = f"/v1/exports/{quote(id)}/files/{quote(file['name'])}"
    while start < file["size"]:
        try:
            response = croft.api.request("GET", path, headers={"range": f"bytes={start}-"})
            for piece in response.chunks():
                start += len(piece)
                deadline = None
                yield piece
        except Exception as error:
            known = ours(error)
            deadline = deadline or time.monotonic() + _GONE
            if known is None or known.code != "daemon" or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _tell(croft: Croft, export: Any, files: list[dict[str, Any]], took: float, piped: bool) -> None:
    notes = dig(export, "status.notes") or ()
    if croft.json and not piped:
        croft.print_json({**export, "files": files})
        return
    for note in notes:
        croft.note(f"note: {note}")
    say = croft.note if piped else croft.say
    for file in files:
        say(f"{file['path']}: {size(file['size'])}")
        if file["sha256"]:
            say(f"  {croft.out.paint('SHA-256', 'dim')}  {file['sha256']}")
    say(f"{dig(export, 'spec.source')} was exported   {croft.out.paint(elapsed(took), 'dim')}")
