"""Backups: VMs as they were at one moment, in a repository that does not need this host."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from undercroft.model.base import Model, Spec
from undercroft.model.task import Task

FORMAT = "undercroft-backup"
VERSION = 1
CHUNK = 64 << 10
"""Bytes of a disk that one checksum stands for: what QEMU's dirty bitmaps count in, too."""
SEGMENT = 1024
"""Chunks that one map names."""


class BackupKind(StrEnum):
    """How it was found out what a backup has to write. Each can be restored by itself."""

    FULL = "full"  # everything was read
    INCREMENTAL = "incremental"  # only what QEMU had marked as changed was read
    COMPARED = "compared"  # everything was read and compared with an earlier backup


class BackupDisk(Model, frozen=True, kw_only=True):
    """A disk of ``size`` bytes. ``maps``: for every `SEGMENT` chunks the SHA-256 (hex) of the map
    that names them; None: all zeroes. ``encrypted``: it was, and is again when it is restored; in
    the backup it is not."""

    size: int
    bus: str = "virtio"
    read_only: bool = False
    encrypted: bool = False
    maps: tuple[str | None, ...] = ()


class BackupFile(Model, frozen=True, kw_only=True):
    """A file that belongs to the VM besides its disks (firmware variables, the TPM's state):
    ``chunks`` are the SHA-256 (hex) of its parts, in their order."""

    name: str
    size: int
    mode: int = 0o600
    chunks: tuple[str, ...] = ()


class BackupImage(Model, frozen=True, kw_only=True):
    """The image that the VM was made from; its disk is in the backup, its kernel is not."""

    name: str
    digest: str


class Backup(Model, frozen=True, kw_only=True):
    """A backup, as its manifest in the repository has it. Sizes in bytes, times in seconds.

    ``vm`` is the id of the VM, ``shape`` its spec. ``checkpoint`` is the moment it holds, for the
    next one to count from; ``parent`` the backup that it was compared with. ``why``: why it is not
    incremental. ``read`` is what was read of the disks, ``written`` what the repository grew by,
    ``changed`` what differs from the parent.
    """

    format: str = FORMAT
    version: int = VERSION
    id: str
    vm: str
    name: str
    host: str = ""
    created: float
    finished: float = 0.0
    kind: BackupKind = BackupKind.FULL
    why: str = ""
    parent: str | None = None
    checkpoint: str | None = None
    quiesced: bool = False
    running: bool = False
    description: str = ""
    shape: dict[str, Any] = {}
    image: BackupImage | None = None
    chunk: int = CHUNK
    disks: tuple[BackupDisk, ...] = ()
    files: tuple[BackupFile, ...] = ()
    read: int = 0
    written: int = 0
    changed: int = 0

    @property
    def size(self) -> int:
        """What its disks hold, in bytes."""
        return sum(disk.size for disk in self.disks)


class BackupCreate(Spec, frozen=True, kw_only=True):
    """A backup to be made into ``repository`` (a directory of the daemon's host; it is made if it
    is not there). ``full``: read everything, also if less would do. ``quiesce``: have the guest's
    agent bring its file systems in order first. ``decrypt``: what is on encrypted disks may be
    written there in the clear."""

    repository: str
    decrypt: bool = False
    full: bool = False
    quiesce: bool = False
    description: str = ""


class BackupStream(Spec, frozen=True, kw_only=True):
    """A backup to be sent as one archive, see `undercroft.storage.backup.archive`; ``decrypt`` as
    in `BackupCreate`."""

    decrypt: bool = False
    quiesce: bool = False
    description: str = ""


class RestoreRequest(Spec, frozen=True, kw_only=True):
    """A ``backup`` (its id, or the name of a VM: its newest) of a ``repository``, or an archive
    that was sent (``upload``: its key), to be restored: as a new VM called ``name`` (None: as it
    was called) in a ``datastore`` (None: the default), or ``over`` one that exists, which with
    ``force`` may run. ``damaged``: also if parts of it are damaged, which then read as zeroes."""

    repository: str = ""
    backup: str = ""
    upload: str | None = None
    name: str | None = None
    datastore: str | None = None
    over: str | None = None
    force: bool = False
    start: bool = False
    damaged: bool = False


class PruneRequest(Spec, frozen=True, kw_only=True):
    """Which backups of each VM stay: the newest ``last``, and the newest one of each of so many
    days, weeks and months. ``vm``: of this VM only (a name or id)."""

    repository: str
    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    vm: str | None = None
    dry_run: bool = False


class VerifyRequest(Spec, frozen=True, kw_only=True):
    """Which ``backups`` (ids, or names of VMs for their newest) are to be verified; none: all."""

    repository: str
    backups: tuple[str, ...] = ()


class Pruned(Model, frozen=True, kw_only=True):
    """The ``backups`` that a rule does not keep, and the task that removes them, if it was not only
    asked."""

    backups: tuple[str, ...]
    task: Task | None = None


class BackupList(Model, frozen=True, kw_only=True):
    """The backups in a repository, oldest first; ``damaged`` are manifests that cannot be read."""

    repository: str
    backups: tuple[Backup, ...]
    damaged: tuple[str, ...] = ()
