"""What belongs to a snapshot besides the layers of its disks. All functions here block."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.hypervisor.suspend import link_state
from undercroft.model.errors import DataError
from undercroft.model.snapshot import Snapshot
from undercroft.storage.files import sync_directory

_BESIDES = ("nvram.fd", "tpm")  # what of a VM's directory belongs to its state


def memory_size(directory: Path) -> int:
    """Bytes of the memory that a snapshot has; 0: none."""
    try:
        return (directory / "memory").stat().st_size
    except FileNotFoundError:
        return 0


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


def copy_besides(source: Path, target: Path) -> None:
    """Copies firmware variables and the TPM's state."""
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    _copy(source, target)
    sync_directory(target)


def restore_state(environment: Environment, snapshot: Snapshot) -> None:
    """Puts firmware variables and the TPM's state back.

    Raises:
        DataError: they are gone.
    """
    target = environment.vm_directory(snapshot.spec.vm)
    source = environment.snapshot_directory(snapshot)
    if not source.is_dir():
        raise DataError(
            f"what belongs to snapshot {snapshot.meta.name} besides its disks is gone",
            object=snapshot.label,
        )
    for name in _BESIDES:
        remove_tree(target / name)
    _copy(source, target)
    sync_directory(target)


def _copy(source: Path, target: Path) -> None:
    for name in _BESIDES:
        path = source / name
        remove_tree(target / name)
        if path.is_dir():
            shutil.copytree(path, target / name, symlinks=True)
            status = path.stat()
            for copied in (target / name, *(target / name).iterdir()):
                os.chown(copied, status.st_uid, status.st_gid, follow_symlinks=False)
        elif path.exists():
            shutil.copy2(path, target / name)
