"""What belongs to a snapshot besides the layers of its disks. Functions here block, but for
the coroutine."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.hypervisor.state_file import link_state
from undercroft.model.errors import DataError
from undercroft.model.snapshot import Snapshot
from undercroft.storage.files import sync_directory

ATTEMPTS = 10
_BESIDES = ("nvram.fd", "tpm")  # what of a VM's directory belongs to its state


def memory_size(directory: Path) -> int:
    """Bytes of the memory that a snapshot has; 0: none."""
    try:
        return (directory / "memory").stat().st_size
    except FileNotFoundError:
        return 0


async def has_memory(environment: Environment, snapshot: Snapshot) -> bool:
    """Whether the memory that belongs to a snapshot is saved."""
    return await asyncio.to_thread(memory_size, environment.snapshot_directory(snapshot)) > 0


def copy_state(environment: Environment, snapshot: Snapshot) -> None:
    """Keeps firmware variables, the TPM's state, and the memory of a VM that is suspended."""
    source = environment.vm_directory(snapshot.spec.vm)
    target = environment.snapshot_directory(snapshot)
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    _copy(source, target)
    saved = environment.suspended_path(snapshot.spec.vm)
    if saved.exists() and not (target / "memory").exists():
        link_state(saved, target / "memory")
    sync_directory(target)
    sync_directory(target.parent)


def check_state(environment: Environment, snapshot: Snapshot) -> None:
    """Does nothing if what belongs to a snapshot besides its disks is there.

    Raises:
        DataError: it is gone.
    """
    directory = environment.snapshot_directory(snapshot)
    if not directory.is_dir() or (snapshot.status.memory and not memory_size(directory)):
        raise DataError(
            f"what belongs to snapshot {snapshot.meta.name} besides its disks is gone",
            object=snapshot.label,
            action="restore it from a backup, or forget the snapshot",
        )


def remove_strays(vms: Path, known: Collection[str]) -> None:
    """Removes what belonged to snapshots (ids) that are not ``known``, of all VMs."""
    for path in vms.glob("*/snapshots/*"):
        if path.name not in known:
            remove_tree(path)


def copy_besides(source: Path, target: Path) -> None:
    """Copies firmware variables and the TPM's state."""
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    _copy(source, target)
    sync_directory(target)


def staged_state(directory: Path) -> Path:
    """Where, in a VM's directory, that is which is about to become its state."""
    return directory / "coming-back"


def stage_state(environment: Environment, snapshot: Snapshot) -> None:
    """Copies firmware variables and the TPM's state to where `restore_state` needs no more room.

    Raises:
        DataError: they are gone. OSError: there is no room; nothing was copied.
    """
    check_state(environment, snapshot)
    staged = staged_state(environment.vm_directory(snapshot.spec.vm))
    remove_tree(staged)
    try:
        copy_besides(environment.snapshot_directory(snapshot), staged)
    except BaseException:
        remove_tree(staged)
        raise


def restore_state(directory: Path) -> None:
    """Puts back what was staged into the directory of a VM."""
    staged = staged_state(directory)
    for name in _BESIDES:
        remove_tree(directory / name)
        if (staged / name).exists():
            (staged / name).rename(directory / name)
    remove_tree(staged)
    sync_directory(directory)


def _copy(source: Path, target: Path) -> None:
    for name in _BESIDES:
        path = source / name
        remove_tree(target / name)
        if path.is_dir():
            _copy_directory(path, target / name)
        elif path.exists():
            shutil.copy2(path, target / name)
            _sync(target / name)


def _copy_directory(source: Path, target: Path) -> None:
    """Copies a TPM's state, which swtpm may be changing: each of its files is replaced by another
    that is whole, so one may go in the middle of this."""
    for _ in range(ATTEMPTS):
        target.mkdir(mode=0o700)
        try:
            for path in source.iterdir():
                shutil.copy2(path, target / path.name, follow_symlinks=False)
        except FileNotFoundError:
            remove_tree(target)
            continue
        break
    status = source.stat()
    for copied in (target, *target.iterdir()):
        os.chown(copied, status.st_uid, status.st_gid, follow_symlinks=False)
        if not copied.is_symlink():
            _sync(copied)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
