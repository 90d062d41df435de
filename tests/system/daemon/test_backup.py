"""Backups of a real guest: what is read, what comes back, and what is left when something is killed
or full in the middle."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation, until, wait_gone
from undercroft.model.backup import Backup, BackupCreate, BackupKind, RestoreRequest
from undercroft.model.requests import StopRequest
from undercroft.model.task import TaskState
from undercroft.storage.backup.repository import Repository

MIB = 1 << 20
SIZE = 48 * MIB


@pytest.fixture
def small(place: Path) -> Iterator[Path]:
    """A directory with room for 3 MiB."""
    path = place / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


class Keeper:
    """Backs up one VM, and knows what each backup must hold."""

    def __init__(self, installation: Installation, repository: Path) -> None:
        self.installation = installation
        self.repository = str(repository)

    def fill(self, at: int, count: int) -> str:
        """Writes so many MiB of noise at an offset in MiB; the checksum of all the disk then."""
        self.installation.shell(
            "web1",
            f"dd if=/dev/urandom of=/dev/vda bs=1M seek={at} count={count} conv=notrunc,fsync",
        )
        return self.sum("web1")

    def sum(self, vm: str) -> str:
        """The checksum of the disk of a VM, running or not, as others would read it."""
        client = self.installation.client
        task = self.installation.finish(client.checkpoints.create(vm))
        id = task.status.result["checkpoint"]
        digest = hashlib.sha256()
        for piece in client.checkpoints.read(vm, id, 0, 0, SIZE):
            digest.update(piece)
        self.installation.finish(client.checkpoints.remove(vm, id))
        return digest.hexdigest()

    def back_up(self, *, quiesce: bool = False) -> Backup:
        client = self.installation.client
        request = BackupCreate(repository=self.repository, quiesce=quiesce)
        task = self.installation.finish(client.backups.create("web1", request))
        return client.backups.get(self.repository, task.status.result["backup"])

    def holds(self, backup: Backup, sum: str) -> None:
        """Restores it, and looks."""
        client = self.installation.client
        request = RestoreRequest(repository=self.repository, backup=backup.id, name="back")
        self.installation.finish(client.backups.restore(request))
        assert self.sum("back") == sum
        self.installation.finish(client.vms.remove("back"))


def command(installation: Installation) -> list[str]:
    """How croft is called."""
    return [sys.executable, "-m", "undercroft.cli", "--data", str(installation.data)]


def croft(installation: Installation, *words: str, **values: object) -> bytes:
    """What croft writes."""
    done = subprocess.run(  # type: ignore[call-overload]
        [*command(installation), *words], stdout=subprocess.PIPE, check=True, **values
    )
    return bytes(done.stdout)


def test_a_guest_is_backed_up_and_comes_back(
    installation: Installation, place: Path, small: Path
) -> None:
    client = installation.client
    installation.run("web1", disk=SIZE)
    keeper = Keeper(installation, place / "backups")

    first = keeper.fill(0, 8)
    full = keeper.back_up()
    assert full.kind is BackupKind.FULL
    assert 8 * MIB <= full.read <= 9 * MIB
    second = keeper.fill(5, 1)
    next_one = keeper.back_up(quiesce=True)
    assert next_one.kind is BackupKind.INCREMENTAL, next_one.why
    assert next_one.quiesced
    assert next_one.read == MIB
    assert MIB <= next_one.written < 1.1 * MIB
    keeper.holds(full, first)
    keeper.holds(next_one, second)

    # Through a pipe, and on.
    archive = croft(installation, "backup", "create", "web1", "--to", "-")
    croft(installation, "backup", "restore", "-", "--as", "piped", "--start", input=archive)
    installation.wait_ready("piped")
    assert installation.shell("piped", "hostname") is not None
    assert keeper.sum("piped") == second
    installation.finish(client.vms.remove("piped", True))
    broken = subprocess.run(
        [*command(installation), "backup", "restore", "-", "--as", "piped"],
        input=archive[:-10],
        capture_output=True,
        check=False,
    )
    assert broken.returncode != 0
    assert b"cut off" in broken.stderr
    assert [vm.meta.name for vm in client.vms.list()] == ["web1"]

    # The repository is full: nothing of it is a backup, and the guest has not noticed.
    request = BackupCreate(repository=str(small))
    task = installation.finish(client.backups.create("web1", request), TaskState.FAILED)
    assert task.status.error is not None
    assert task.status.error.code == "no-space"
    assert client.backups.list(str(small)).backups == ()

    # Killed in the middle, the daemon goes on with it when it is back.
    third = keeper.fill(20, 9)
    with Repository.open(place / "backups").locked():
        task = client.backups.create("web1", BackupCreate(repository=keeper.repository))
        until(lambda: client.checkpoints.list("web1")[-1].status.state == "open", "it is begun")
        installation.kill()
    installation.start()
    done = installation.finish(task)
    cut_off = client.backups.get(keeper.repository, done.status.result["backup"])
    assert cut_off.kind is BackupKind.INCREMENTAL, cut_off.why
    keeper.holds(cut_off, third)

    # What was marked survives the guest's end, but not QEMU's.
    fourth = keeper.fill(31, 1)
    installation.finish(client.vms.stop("web1", StopRequest(force=True)))
    off = keeper.back_up()
    assert (off.kind, off.read) == (BackupKind.INCREMENTAL, MIB), off.why
    keeper.holds(off, fourth)
    installation.finish(client.vms.start("web1"))
    installation.wait_ready("web1")
    fifth = keeper.fill(3, 1)
    for pid in installation.processes():
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
    until(lambda: client.vms.get("web1").status.state.value != "running", "it is noticed")
    lost = keeper.back_up()
    assert lost.kind is BackupKind.COMPARED
    assert "killed" in lost.why
    assert lost.written < 1.1 * MIB
    keeper.holds(lost, fifth)

    installation.finish(client.backups.verify(keeper.repository))
    assert client.checkpoints.list("web1")[-1].spec.owner.startswith("backup/repo-")
    assert len(client.checkpoints.list("web1")) == 1
    installation.assert_in_order()
