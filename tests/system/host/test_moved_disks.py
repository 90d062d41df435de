"""Disks that go from one VM to another, or to another place: what was kept of them stays what it
was, and comes back where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.host.incarnation import Incarnation
from undercroft.model.backup import BackupCreate, RestoreRequest
from undercroft.model.errors import UndercroftError
from undercroft.model.names import new_id
from undercroft.model.requests import (
    DatastoreCreate,
    RevertRequest,
    SnapshotCreate,
    StopRequest,
    VMCreate,
    VolumeAttach,
    VolumeClone,
    VolumeCreate,
)
from undercroft.model.vm import RestartPolicy
from undercroft.storage.backup.reading import read_disk
from undercroft.storage.backup.repository import Repository

MIB = 1 << 20


@pytest.fixture
def daemon(data: Path) -> Iterator[Incarnation]:
    incarnation = Incarnation(data)
    for name in ("a", "b"):
        request = VMCreate(
            name=name, disk=8 * MIB, memory=64 * MIB, ports=(), restart=RestartPolicy.NEVER
        )
        incarnation.ask("do", "vms.create", request)
    yield incarnation
    incarnation.kill()


def move(daemon: Incarnation, vm: str, volume: str = "a-boot", *, read_only: bool = False) -> None:
    """Gives a disk to a VM, as its last one."""
    daemon.ask("do", "volumes.detach", volume)
    daemon.ask("do", "volumes.attach", volume, VolumeAttach(vm=vm, read_only=read_only))


def test_a_snapshot_of_a_read_only_disk(daemon: Incarnation) -> None:
    daemon.ask("write", "a", ["write -P 1 0 64k"])
    move(daemon, "b", read_only=True)
    layer = daemon.ask("disk_head", "b", 1)
    daemon.ask("do", "snapshots.create", "b", SnapshotCreate(name="s1"))
    move(daemon, "a")
    daemon.ask("write", "a", ["write -P 2 0 64k"])
    assert daemon.ask("read", "head", "a", [0], 4096) == [2]
    assert daemon.ask("read", "layer", layer, [0], 4096) == [1]
    daemon.ask("do", "volumes.detach", "a-boot")
    daemon.ask("do", "snapshots.revert", "b", "s1", RevertRequest(force=True))
    assert daemon.ask("read", "layer", daemon.ask("disk_head", "b", 1), [0], 4096) == [1]
    assert daemon.ask("findings") == []


def test_a_backup_of_a_read_only_disk(daemon: Incarnation, tmp_path: Path) -> None:
    path = tmp_path / "backups"
    daemon.ask("write", "a", ["write -P 1 0 64k"])
    move(daemon, "b", read_only=True)
    daemon.ask("do", "backups.create", "b", BackupCreate(repository=str(path)))
    daemon.ask("peace")
    move(daemon, "a")
    daemon.ask("write", "a", ["write -P 2 0 64k"])
    move(daemon, "b", read_only=True)
    daemon.ask("do", "backups.create", "b", BackupCreate(repository=str(path)))
    daemon.ask("peace")
    repository = Repository.open(path)
    packs = repository.packs()
    backup = repository.newest(daemon.ask("ids")["b"])
    assert backup is not None
    assert len(repository.list()[0]) == 2
    assert [content[0] for _, content in read_disk(packs.get, backup, backup.disks[1])] == [2]
    packs.close()


def test_a_backup_goes_over_the_disks_that_it_was_made_of(
    daemon: Incarnation, tmp_path: Path
) -> None:
    path = str(tmp_path / "backups")
    daemon.ask("write", "a", ["write -P 1 0 64k"])
    move(daemon, "b")
    move(daemon, "b", "b-boot")
    daemon.ask("do", "backups.create", "b", BackupCreate(repository=path))
    daemon.ask("peace")
    move(daemon, "b")  # behind b-boot, in which there is nothing
    request = RestoreRequest(repository=path, backup="b", over="b", force=True)
    daemon.ask("do", "backups.restore", request)
    assert [
        daemon.ask("read", "layer", daemon.ask("disk_head", "b", index), [0], 4096)
        for index in (0, 1)
    ] == [[0], [1]]
    assert daemon.ask("findings") == []

    # Another disk that has come in place of one is not what was backed up.
    daemon.ask("do", "volumes.detach", "a-boot")
    daemon.ask("do", "volumes.create", VolumeCreate(name="other", size=8 * MIB))
    daemon.ask("do", "volumes.attach", "other", VolumeAttach(vm="b"))
    with pytest.raises(UndercroftError, match="other disks"):
        daemon.ask("do", "backups.restore", request)


def test_what_is_encrypted_does_not_go_into_what_is_not(
    daemon: Incarnation, tmp_path: Path
) -> None:
    """A linked clone lies on layers in the clear, which nobody but itself needs any more once its
    source is gone."""
    daemon.ask("write", "a", ["write -P 1 0 64k"])
    daemon.ask("do", "volumes.detach", "a-boot")
    daemon.ask("do", "volumes.clone", "a-boot", VolumeClone(name="vault", encrypted=True))
    daemon.ask("do", "volumes.remove", "a-boot")
    daemon.ask("do", "volumes.attach", "vault", VolumeAttach(vm="b"))
    daemon.ask("do", "vms.start", "b")
    request = BackupCreate(repository=str(tmp_path / "backups"), decrypt=True)
    daemon.ask("do", "backups.create", "b", request)
    daemon.ask("peace")
    assert daemon.ask("encrypted", daemon.ask("disk_head", "b", 1))
    assert daemon.ask("findings") == []

    # Nor does it when it is restored over what is not.
    daemon.ask("do", "volumes.create", VolumeCreate(name="plain", size=8 * MIB))
    daemon.ask("do", "volumes.attach", "plain", VolumeAttach(vm="a"))
    daemon.ask("do", "volumes.create", VolumeCreate(name="other", size=8 * MIB))
    daemon.ask("do", "volumes.attach", "other", VolumeAttach(vm="a"))
    over = RestoreRequest(repository=request.repository, backup="b", over="a", force=True)
    daemon.ask("do", "backups.restore", over)
    assert [daemon.ask("encrypted", daemon.ask("disk_head", "a", index)) for index in (0, 1)] == [
        False,
        True,
    ]
    daemon.ask("do", "vms.start", "a")
    daemon.ask("running", "a")
    assert daemon.ask("findings") == []


def test_a_clone_of_a_read_only_disk_that_is_in_use(daemon: Incarnation) -> None:
    daemon.ask("write", "a", ["write -P 1 0 64k"])
    move(daemon, "b", read_only=True)
    daemon.ask("do", "vms.start", "b")
    daemon.ask("running", "b")
    daemon.ask("do", "volumes.clone", "a-boot", VolumeClone(name="copy"))
    daemon.ask("do", "vms.stop", "b", StopRequest(force=True))
    move(daemon, "a")
    daemon.ask("write", "a", ["write -P 2 0 64k"])
    daemon.ask("do", "volumes.detach", "a-boot")
    daemon.ask("do", "volumes.attach", "copy", VolumeAttach(vm="a"))
    assert daemon.ask("read", "head", "a", [0], 4096) == [1]
    assert daemon.ask("findings") == []


def test_files_of_others_in_a_datastore_stay(daemon: Incarnation, data: Path) -> None:
    place = data.parent / "place"
    daemon.ask("do", "datastores.create", DatastoreCreate(name="place", path=str(place)))
    ours, theirs = place / f"{new_id('layer')}.qcow2", place / "debian.qcow2"
    ours.touch()
    theirs.touch()
    daemon.ask("do", "hosts.check_volumes", True)
    assert theirs.exists()
    assert not ours.exists()


def test_layers_of_a_read_only_disk_are_put_together_while_it_is_in_use(
    daemon: Incarnation,
) -> None:
    daemon.ask("write", "a", ["write -P 1 0 64k"])
    move(daemon, "b", read_only=True)
    daemon.ask("do", "snapshots.create", "b", SnapshotCreate(name="s1"))
    move(daemon, "a")
    daemon.ask("write", "a", ["write -P 2 0 4k"])
    move(daemon, "b", read_only=True)
    daemon.ask("do", "vms.start", "b")
    daemon.ask("running", "b")
    daemon.ask("do", "snapshots.remove", "b", "s1")
    head = daemon.ask("disk_head", "b", 1)
    daemon.ask("do", "vms.stop", "b", StopRequest(force=True))
    move(daemon, "a")
    assert daemon.ask("disk_head", "a", 0) == head
    assert daemon.ask("depth", "a") == 1
    assert daemon.ask("read", "head", "a", [0, 8192], 4096) == [2, 1]
    assert daemon.ask("findings") == []


def test_a_disk_that_is_just_coming_is_not_backed_up_in_the_clear(
    daemon: Incarnation, tmp_path: Path
) -> None:
    daemon.ask("do", "volumes.create", VolumeCreate(name="vault", size=8 * MIB, encrypt=True))
    attach = VolumeAttach(vm="a")
    request = BackupCreate(repository=str(tmp_path / "backups"))
    with pytest.raises(UndercroftError, match="encrypted"):
        daemon.ask("do_both", "volumes.attach", ("vault", attach), "backups.create", ("a", request))
