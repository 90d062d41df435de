"""Copying files into and out of guests."""

from __future__ import annotations

import os
import posixpath
import sys
import tempfile
import time
from typing import cast

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import OK, UsageError, ours
from undercroft.cli.guest import execute
from undercroft.cli.output import elapsed, size
from undercroft.cli.patience import PATIENCE, patiently
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from undercroft.cli.context import Croft

_PIECE = 256 << 10
Sent = tuple[int, str]  # bytes, and where they are now


class Copy(Command):
    """``croft cp SOURCE… TARGET``"""

    description = """
        Copies files between here and a VM, through its guest agent; a path in a VM is written
        VM:/PATH and begins with /. A target that is a directory takes the file's own name. Either
        side may be - for a pipe. Directories are not copied as such: pack them (see the examples).
    """
    examples = (
        ("croft cp web1:/etc/hosts .", "out of the VM"),
        ("croft cp index.html style.css web1:/var/www/html/", "into it"),
        ("croft cp web1:/var/log/syslog - | less", "to a pipe"),
        ("tar c site | croft exec web1 -- tar x -C /srv", "a whole directory"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("paths", nargs="+", metavar="SOURCE… TARGET", help="FILE or VM:/PATH")

    def run(self, croft: Croft, args: Namespace) -> int:
        if len(args.paths) < 2:
            raise UsageError("croft cp needs a source and a target", "croft cp web1:/etc/hosts .")
        *sources, target = args.paths
        there = _split(target)
        if len(sources) > 1 and not (target.endswith("/") or there or os.path.isdir(target)):
            raise UsageError(f"{target} is not a directory", "several files need one to go to")
        begun, total, done = time.monotonic(), 0, []
        for source in sources:
            here = _split(source)
            if here is None and there is not None:
                count, where = _upload(croft, source, *there, len(sources) > 1)
            elif here is not None and there is None:
                count, where = _download(croft, *here, target)
            else:
                raise UsageError(
                    f"of {source} and {target} one must be in a VM, the other here",
                    "write paths in a VM as VM:/PATH",
                )
            total += count
            done.append({"source": source, "target": where, "size": count})
        if croft.json:
            croft.print_json(done[0] if len(done) == 1 else done)
        elif target != "-":
            what = done[0]["target"] if len(done) == 1 else f"{len(done)} files to {target}"
            took = croft.out.paint(elapsed(time.monotonic() - begun), "dim")
            croft.say(f"{what}: {size(total)}   {took}")
        return OK


def _split(text: str) -> tuple[str, str] | None:
    """VM and path of ``web1:/etc/hosts``; None for a path here."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or not name:
        return None
    if not path.startswith("/"):
        raise UsageError(f"{text}: a path in a VM begins with /", f"write {name}:/{path or 'tmp/'}")
    return name, path


def _download(croft: Croft, name: str, path: str, target: str) -> tuple[int, str]:
    from undercroft.cli.transfer import shown

    if os.path.isdir(target) or target.endswith("/"):
        target = os.path.join(target, posixpath.basename(path.rstrip("/")))
    response = patiently(
        croft,
        name,
        lambda: croft.api.request(
            "GET", f"/v1/vms/{quote(name)}/files", params={"path": path}, timeout=600.0
        ),
        PATIENCE,
    )
    announced = response.headers.get("content-length", "")
    length = int(announced) if announced.isdigit() else None
    with response, shown(croft, f"{name}:{path}", length) as count:
        pieces = count(response.chunks())
        if target == "-":
            return _drain(pieces, sys.stdout.buffer), target
        if os.path.exists(target) and not os.path.isfile(target):
            with open(target, "wb") as device:  # a device or pipe: nothing to put in its place
                return _drain(pieces, device), target
        directory = os.path.dirname(os.path.abspath(target))
        handle, half = tempfile.mkstemp(prefix=".croft-", dir=directory)
        try:
            with os.fdopen(handle, "wb") as file:
                total = _drain(pieces, file)
            os.chmod(half, 0o666 & ~_umask())
            os.replace(half, target)
        except BaseException:
            os.unlink(half)
            raise
        return total, target


def _drain(pieces: Iterator[bytes], file: BinaryIO) -> int:
    total = 0
    for piece in pieces:
        file.write(piece)
        total += len(piece)
    file.flush()
    return total


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _upload(croft: Croft, source: str, name: str, path: str, many: bool) -> tuple[int, str]:
    own = "stdin" if source == "-" else os.path.basename(os.path.abspath(source))
    if source != "-" and os.path.isdir(source):
        raise UsageError(
            f"{source} is a directory",
            f"pack it: tar c {source} | croft exec {name} -- tar x -C {path}",
        )
    if many and not path.endswith("/"):
        path += "/"
    if source == "-":  # cannot be begun anew, so the agent has to be there
        patiently(croft, name, lambda: execute(croft, name, ["true"], timeout=20.0), PATIENCE)
    if path.endswith("/"):
        path += own
        return cast(
            Sent, patiently(croft, name, lambda: _send(croft, source, name, path), PATIENCE)
        )
    try:
        return cast(
            Sent, patiently(croft, name, lambda: _send(croft, source, name, path), PATIENCE)
        )
    except Exception as error:
        known = ours(error)
        if known is None or known.code != "guest-agent" or not _is_directory(croft, name, path):
            raise
        return _send(croft, source, name, f"{path}/{own}")


def _is_directory(croft: Croft, name: str, path: str) -> bool:
    from undercroft.model.errors import UndercroftError

    try:
        return bool(execute(croft, name, ["test", "-d", path], timeout=20.0).get("exit_code") == 0)
    except UndercroftError:
        return False


def _send(croft: Croft, source: str, name: str, path: str) -> tuple[int, str]:
    import json

    from undercroft.cli.transfer import shown

    descriptor = 0 if source == "-" else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        mode = None if source == "-" else f"{status.st_mode & 0o777:04o}"
        length = None if source == "-" else status.st_size
        with shown(croft, f"{name}:{path}", length) as count:
            response = croft.api.request(
                "PUT",
                f"/v1/vms/{quote(name)}/files",
                params={"path": path, "mode": mode},
                headers={"content-type": "application/octet-stream"},
                body=count(_pieces(descriptor)),
                timeout=600.0,
            )
            return int(json.loads(response.read())["size"]), f"{name}:{path}"
    finally:
        if source != "-":
            os.close(descriptor)


def _pieces(descriptor: int) -> Iterator[bytes]:
    while data := os.read(descriptor, _PIECE):
        yield data
