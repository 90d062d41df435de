"""Taking apart images that are published compressed, in a program of its own that can do little."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from undercroft.model.errors import HostileImageError, InvalidError, TooLargeError
from undercroft.model.units import GiB, MiB, TiB, format_size
from undercroft.storage.files import disk_full_is_clear, require_space
from undercroft.storage.process import Identity, Limits, Progress, no_progress, tool
from undercroft.storage.threads import Stop, in_thread

__all__ = ["compression_of", "decompress"]

# Suffix of the name: program, Debian's package of it.
_PROGRAMS = {
    ".xz": ("xz", "xz-utils"),
    ".gz": ("gzip", "gzip"),
    ".zst": ("zstd", "zstd"),
    ".bz2": ("bzip2", "bzip2"),
}
_PIECE = 1 * MiB
_CHECK_EVERY = 32 * MiB
_LIMITS = {"memory": 1 * GiB, "cpu": 7200}


def compression_of(name: str) -> str | None:
    """The compression that the name of a file tells (``.xz``, ``.gz``, ``.zst``, ``.bz2``)."""
    suffix = os.path.splitext(name.lower())[1]
    return suffix if suffix in _PROGRAMS else None


async def decompress(
    source: Path,
    target: Path,
    compression: str,
    *,
    limit: int = 16 * TiB,
    identity: Identity | None = None,
    progress: Progress = no_progress,
) -> None:
    """Writes what is in a compressed file, with holes for zeros; a ``target`` is replaced.

    ``limit`` is the most bytes that may come out. ``identity``: whom the program runs as, where
    this process is root.

    Raises:
        InvalidError: the compression is not known.
        HostileImageError: it is not compressed like that, or damaged.
        TooLargeError: more comes out than the limit.
        NoSpaceError: it does not fit.
        MissingToolError: the program is not installed.
    """
    if compression not in _PROGRAMS:
        raise InvalidError(f"{compression[:40]!r} is not a compression that is known")
    name, package = _PROGRAMS[compression]
    command = [
        *(identity.prefix() if identity is not None and os.geteuid() == 0 else []),
        *Limits(**_LIMITS).prefix(),
        tool(name, package=package),
        "--decompress",
        "--stdout",
    ]

    def work(stop: Stop) -> None:
        with disk_full_is_clear("unpacking the image", target.parent):
            _run(command, source, target, limit, progress, stop)

    try:
        await in_thread(work)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _run(
    command: list[str], source: Path, target: Path, limit: int, progress: Progress, stop: Stop
) -> None:
    target.unlink(missing_ok=True)
    with (
        source.open("rb", buffering=0) as packed,
        target.open("xb", buffering=0) as file,
        subprocess.Popen(
            command,
            stdin=packed,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        ) as child,
    ):
        stop.also(child.kill)
        try:
            size = max(os.fstat(packed.fileno()).st_size, 1)
            report = _reporter(packed.fileno(), size, progress)
            done = _copy(child, file.fileno(), target, limit, report, stop)
            code = child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        stop.check()
        if code != 0 or done == 0:
            raise HostileImageError(
                f"what was fetched cannot be unpacked: {command[-3].rpartition('/')[2]} ended with "
                f"{code} after {format_size(done)}",
                action="get it again from a source you trust, or unpack it there",
            )


def _reporter(packed: int, size: int, progress: Progress) -> Callable[[int], None]:
    """The program reads through our own open file: where that stands is how far it is."""
    return lambda done: progress(
        os.lseek(packed, 0, os.SEEK_CUR) / size, f"unpacking, {format_size(done)} so far"
    )


def _copy(
    child: subprocess.Popen[bytes],
    fd: int,
    target: Path,
    limit: int,
    report: Callable[[int], None],
    stop: Stop,
) -> int:
    """Copies the program's output into the file, and counts its bytes."""
    zeros = bytes(_PIECE)
    done = unchecked = 0
    while child.stdout is not None and (piece := child.stdout.read(_PIECE)):
        stop.check()
        if done + len(piece) > limit:
            raise TooLargeError(f"the image unpacks to more than {format_size(limit)}")
        if piece != zeros:
            view, at = memoryview(piece), done
            while view:
                written = os.pwrite(fd, view, at)
                view, at = view[written:], at + written
            unchecked += len(piece)
        done += len(piece)
        if unchecked >= _CHECK_EVERY:
            require_space("unpacking the image", target.parent, 0)
            unchecked = 0
        report(done)
    os.ftruncate(fd, done)
    return done
