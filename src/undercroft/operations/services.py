"""What operations need of the host that owns an object: the seam between deciding and doing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from undercroft.model.appliance import Appliance
from undercroft.model.backup import Backup, BackupList
from undercroft.model.checkpoint import Changes, Checkpoint
from undercroft.model.datastore import Datastore
from undercroft.model.requests import CheckReport, ExecRequest, ExecResult, VMSample
from undercroft.model.transfer import ImportSource, UploadStatus
from undercroft.model.vm import VM
from undercroft.storage.catalogue import CatalogueEntry


@dataclass(frozen=True)
class Examined:
    """What is in a file that comes in: ``image`` is the digest of the image whose kernel it booted
    where it came from; ``arch`` that of its processor."""

    appliance: Appliance
    image: str | None
    arch: str


class ConsoleSession(Protocol):
    """One attachment to a serial console. Closing it leaves the guest alone."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Output from now on, preceded by the scrollback that was asked for; ends when the VM's
        console does."""

    async def write(self, data: bytes) -> None:
        """Types into the console; waits while the guest does not take it."""

    async def close(self) -> None:
        """Detaches."""


class ByteStream(Protocol):
    """A two-way stream of bytes, such as a VNC connection (RFB, RFC 6143)."""

    async def read(self) -> bytes:
        """Some bytes; empty at the end."""

    async def write(self, data: bytes) -> None:
        """Sends bytes."""

    async def close(self) -> None:
        """Ends it."""


class HostServices(Protocol):
    """A host as the operations see it. Methods take the VM's record, which they have checked.

    All may raise `WrongStateError` (not running), `GuestAgentError`, `UnsupportedError`,
    `TimeLimitError` and `UnavailableError`.
    """

    async def exec(self, vm: VM, request: ExecRequest) -> ExecResult:
        """Runs a program in the guest through its agent."""

    def read_file(self, vm: VM, path: str) -> AsyncIterator[bytes]:
        """The content of a file in the guest."""

    async def write_file(
        self, vm: VM, path: str, content: AsyncIterator[bytes], mode: int | None = None
    ) -> int:
        """Writes a file in the guest, returns its size in bytes."""

    async def screenshot(self, vm: VM) -> bytes:
        """The display as PNG."""

    async def console(self, vm: VM, scrollback: int) -> ConsoleSession:
        """Attaches to the serial console; ``scrollback`` in bytes."""

    async def vnc(self, vm: VM) -> ByteStream:
        """Attaches to the display."""

    async def log(self, vm: VM, limit: int) -> bytes:
        """The last ``limit`` bytes of console output, also of a stopped VM."""

    async def samples(self) -> Sequence[VMSample]:
        """Measurements of all running VMs."""

    def held(self, template: str) -> Sequence[str]:
        """The VMs (ids) that are held ready on a template (an id), or were until just now."""

    async def measure(self, *, now: bool = False) -> Mapping[str, int]:
        """Bytes on the host that the file of each layer takes, by the layer's id; what volumes
        take, and how full datastores are, is written down as well where it has changed. A moment
        old at most, or with ``now`` not even that."""

    async def prepare_datastore(self, path: str, id: str) -> bool:
        """Makes a directory the datastore ``id``; whether copies in it can share blocks.

        Raises:
            AlreadyExistsError, DataError: it cannot be one.
        """

    async def forget_datastore(self, datastore: Datastore) -> None:
        """Makes a directory no datastore any more."""

    async def check_volumes(self, repair: bool) -> CheckReport:
        """Looks for what is wrong with volumes and their layers."""

    async def check(self, repair: bool) -> CheckReport:
        """Looks for what a crash left behind, and puts it right on request."""

    async def catalogue(self) -> dict[str, CatalogueEntry]:
        """The images that can be fetched by name; `DataError` if the user's file of them makes no
        sense."""

    def read_export(self, path: Path, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes of a finished file of an export, from ``start`` up to ``end``."""

    async def check_medium(self, path: str) -> None:
        """Does nothing if a file of this host can be in a CD-ROM drive; `NotFoundError`,
        `InvalidError` if not."""

    async def examine(self, source: ImportSource) -> Examined:
        """What is in a file that comes in; `HostileImageError` if it is refused."""

    async def upload_status(self, key: str) -> UploadStatus:
        """How much of what is being sent is there."""

    async def append_upload(
        self, key: str, offset: int, content: AsyncIterator[bytes]
    ) -> UploadStatus:
        """Adds to it; see `undercroft.operations.uploads`."""

    async def remove_upload(self, key: str) -> UploadStatus:
        """Forgets it; what it was."""

    async def changes(
        self, vm: VM, checkpoint: Checkpoint, disk: int, since: Checkpoint | None
    ) -> Changes:
        """What of a disk at an open checkpoint is not what it was at an earlier one; without one,
        what is not zeroes. `ConflictError` if it cannot be told."""

    def read_disk(
        self, vm: VM, checkpoint: Checkpoint, disk: int, offset: int, length: int
    ) -> AsyncIterator[bytes]:
        """A part of a disk at an open checkpoint."""

    async def repository(self, path: str) -> str:
        """The id of the repository in a directory of this host, made if it is not there."""

    async def backups(self, repository: str) -> BackupList:
        """What is in a repository: a directory of this host."""

    def stream_backup(
        self, vm: VM, checkpoint: Checkpoint, id: str, description: str
    ) -> AsyncIterator[bytes]:
        """A backup of what an open checkpoint holds, as an archive."""

    async def archived(self, upload: str) -> Backup:
        """What is in an archive that was sent; `DataCorruptError` if it is none."""

    async def backup(self, repository: str, ref: str) -> Backup:
        """One backup: its id, or the name or id of a VM for its newest."""

    def upload_path(self, name: str) -> Path:
        """A fresh path in the data directory for content that is being sent (`ImageSourceKind`
        UPLOAD); removed by the agent once imported, or at its next start."""
