"""Disks and backups for tests of repositories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from undercroft.model.backup import CHUNK, Backup, BackupDisk
from undercroft.model.names import new_id
from undercroft.storage.backup.writing import Sink, Tally, put_disk
from undercroft.storage.threads import Stop


class FakeDisk:
    """A disk whose content is known; it says of whole chunks of zeroes that they hold nothing."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.asked = 0

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts that are not all zeroes."""
        for at in range(offset, offset + length, CHUNK):
            size = min(CHUNK, offset + length - at)
            if self.content[at : at + size].strip(b"\0"):
                yield at, size

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
        """The content of ranges."""
        for offset, length in ranges:
            self.asked += length
            yield offset, bytearray(self.content[offset : offset + length])


def put(
    sink: Sink,
    disk: FakeDisk,
    parent: BackupDisk | None = None,
    changed: Sequence[tuple[int, int]] | None = None,
) -> BackupDisk:
    """Puts a disk into a sink."""
    tally = Tally(Stop(), lambda done: None)
    tally.total = disk.size
    return put_disk(
        sink, disk, tally, parent=parent, changed=changed, bus="virtio", read_only=False
    )


def backup_of(
    sink: Sink,
    disk: FakeDisk,
    parent: Backup | None = None,
    changed: Sequence[tuple[int, int]] | None = None,
    created: float = 1e9,
    vm: str = "vm-1",
) -> Backup:
    """A backup of one disk."""
    made = put(sink, disk, parent.disks[0] if parent is not None else None, changed)
    return Backup(id=new_id("backup"), vm=vm, name="web1", created=created, disks=(made,))
