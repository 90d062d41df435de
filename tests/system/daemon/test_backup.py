"""Backups of real guests: what is read, what comes back, and what a crash in the middle leaves."""

from __future__ import annotations

from pathlib import Path

from tests.system.daemon.installation import Installation
from undercroft.model.backup import Backup, BackupCreate, BackupKind, RestoreRequest
from undercroft.model.task import Task

GIB = 1 << 30
MIB = 1 << 20


def done(installation: Installation, task: Task) -> Task:
    return installation.finish(task)


def back_up(installation: Installation, repository: Path, name: str = "web1") -> Backup:
    client = installation.client
    request = BackupCreate(repository=str(repository))
    task = done(installation, client.backups.create(name, request))
    return client.backups.get(str(repository), task.status.result["backup"])


def fill(installation: Installation, name: str, at: int, count: int) -> str:
    """Writes so many MiB of noise at an offset in MiB; their checksum."""
    installation.shell(
        name,
        f"dd if=/dev/urandom of=/dev/vda bs=1M seek={at} count={count} conv=notrunc,fsync",
    )
    return whole(installation, name)


def whole(installation: Installation, name: str) -> str:
    """The checksum of all that the guest sees of its disk."""
    return installation.shell(
        name, "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M 2>/dev/null | sha256sum"
    )


def test_full_and_incremental(installation: Installation, place: Path) -> None:
    repository = place / "backups"
    client = installation.client
    installation.run("web1", disk=128 * MIB)
    first = fill(installation, "web1", 0, 20)
    full = back_up(installation, repository)
    assert full.kind is BackupKind.FULL
    assert 20 * MIB <= full.read <= 21 * MIB
    second = fill(installation, "web1", 7, 1)
    small = back_up(installation, repository)
    assert small.kind is BackupKind.INCREMENTAL, small.why
    assert small.read == MIB
    assert MIB <= small.written < 1.2 * MIB
    installation.finish(client.backups.verify(str(repository)))
    for backup, expected in ((full, first), (small, second)):
        name = f"r-{backup.kind}"
        request = RestoreRequest(
            repository=str(repository), backup=backup.id, name=name, start=True
        )
        installation.finish(client.backups.restore(request))
        installation.wait_ready(name)
        assert whole(installation, name) == expected
    installation.assert_in_order()
