"""The files in which a guest's state is kept.

The file is QEMU's migration stream. Beside it, under the name + ``.plan``, is the plan of the
machine that it came from: only the same machine can take it up again. While it is being written it
has the name + ``.part``.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from undercroft.hypervisor.plan import MachinePlan, decode_plan, encode_plan
from undercroft.model.errors import DataCorruptError

__all__ = [
    "discard_state",
    "full_message",
    "is_full",
    "link_state",
    "part_path",
    "publish_state",
    "suspended_plan",
]

_NOTHING = 256 << 10  # bytes: with no more than that free, the disk is full


def _plan_path(path: Path) -> Path:
    return path.with_name(path.name + ".plan")


def part_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def suspended_plan(path: Path) -> MachinePlan:
    """The plan with which the state in ``path`` must be resumed (same hardware, same board
    version). Its files and ports may be set anew; its devices may not.

    Raises:
        DataCorruptError: there is none, or it is damaged.
    """
    try:
        path.stat()
        return decode_plan(_plan_path(path).read_bytes())
    except (OSError, msgspec.MsgspecError) as error:
        raise DataCorruptError(
            f"the suspended state in {path} cannot be resumed: {error}",
            action="start the VM afresh; what was in its memory is lost",
        ) from error


def discard_state(path: Path) -> None:
    """Removes a suspended state, durably, and whatever an interrupted suspend left."""
    there = path.exists()
    for name in (path, _plan_path(path), part_path(path)):
        name.unlink(missing_ok=True)
    if there:
        _sync(path.parent)


def link_state(path: Path, other: Path) -> None:
    """Keeps a saved state under another name as well. Neither file is ever written to again, so
    they may share their content."""
    for old, new in ((_plan_path(path), _plan_path(other)), (path, other)):
        new.unlink(missing_ok=True)
        os.link(old, new)
    _sync(other.parent)


def publish_state(part: Path, path: Path, plan: MachinePlan) -> None:
    """Makes the file durable, and only then visible under its name."""
    plan_path = _plan_path(path)
    temporary = part_path(plan_path)
    with temporary.open("wb") as file:
        file.write(encode_plan(plan))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, plan_path)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_message(name: str, directory: Path) -> str:
    """That the state of a VM finds no room."""
    return f"the state of {name} cannot be written: the disk that holds {directory} is full"


def is_full(directory: Path) -> bool:
    """Whether nothing can be written on the disk that a directory is on. Blocks."""
    usage = os.statvfs(directory)
    return usage.f_bavail * usage.f_frsize < _NOTHING
