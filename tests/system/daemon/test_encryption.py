"""Encrypted disks: nothing of what a guest writes is on the host's disk, nor is the key where it
would be seen, whatever else is done with them."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation
from undercroft.model.backup import BackupCreate, RestoreRequest
from undercroft.model.errors import InvalidError, UnsupportedError
from undercroft.model.requests import (
    CloneMode,
    CloneRequest,
    SnapshotCreate,
    StopRequest,
    VolumeAttach,
    VolumeClone,
    VolumeCreate,
    VolumeResize,
)
from undercroft.model.task import TaskState
from undercroft.model.transfer import ExportCreate
from undercroft.model.units import GiB, MiB

SECRET = "the treasure is beneath the old oak"


def write(installation: Installation, name: str, disk: str = "vda", at: int = 0) -> None:
    """Has the guest write a MiB of the secret."""
    text = f"yes '{SECRET}' | head -c 1048576"
    place = f"dd of=/dev/{disk} bs=1M seek={at} conv=fsync"
    installation.shell(name, f"{text} | {place} iflag=fullblock 2>/dev/null")


def knows(installation: Installation, name: str, disk: str = "vda", at: int = 0) -> bool:
    """Whether the guest reads it."""
    installation.shell(name, "echo 3 > /proc/sys/vm/drop_caches")
    command = f"dd if=/dev/{disk} bs=1M skip={at} count=1 2>/dev/null | grep -c '{SECRET}'"
    return int(installation.shell(name, f"{command}; true")) > 1000


def layers(installation: Installation) -> list[Path]:
    return sorted((installation.data / "volumes").iterdir())


def keys(installation: Installation) -> list[Path]:
    return sorted((installation.data / "keys").iterdir())


def in_the_clear(installation: Installation) -> list[Path]:
    """The files of layers that the secret can be read in."""
    return [path for path in layers(installation) if SECRET.encode() in path.read_bytes()]


def test_nothing_of_an_encrypted_disk_is_ever_in_the_clear(
    installation: Installation, place: Path
) -> None:
    client = installation.client
    installation.run("web1", disk=GiB, encrypt=True)
    request = VolumeCreate(name="plain", size=32 * MiB)
    installation.finish(client.volumes.create(request))
    request = VolumeCreate(name="thick", size=32 * MiB, encrypt=True, preallocate=True)
    installation.finish(client.volumes.create(request))
    for name in ("thick", "plain"):
        installation.finish(client.volumes.attach(name, VolumeAttach(vm="web1")))
    for disk in ("vda", "vdb", "vdc"):
        write(installation, "web1", disk)
    # The test would see it: what is not encrypted is there to be read.
    plain = client.volumes.get("plain").status.head
    assert in_the_clear(installation) == [installation.data / "volumes" / f"{plain}.qcow2"]
    installation.finish(client.volumes.detach("plain"))
    installation.finish(client.volumes.remove("plain"))
    untouched = installation.shell("web1", "tail -c 16M /dev/vdb | tr -d '\\0' | wc -c")
    assert untouched == "0"

    # Each layer has a key of its own, which stands nowhere else.
    assert [key.name for key in keys(installation)] == [p.stem for p in layers(installation)]
    secrets = [key.read_text() for key in keys(installation)]
    assert len(set(secrets)) == len(secrets) == 2
    assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in keys(installation))

    # Branching off, merging, going back, while the guest goes on.
    task = client.snapshots.create("web1", SnapshotCreate(name="before", memory=True))
    installation.finish(task)
    write(installation, "web1", at=4)
    installation.finish(client.snapshots.create("web1", SnapshotCreate(name="after")))
    installation.finish(client.snapshots.remove("web1", "after"))
    assert knows(installation, "web1")
    assert knows(installation, "web1", at=4)

    # Clones of all kinds; the daemon begins anew in between.
    installation.kill()
    installation.start()
    for name, mode in (("web2", CloneMode.INSTANT), ("web3", CloneMode.FULL)):
        (task,) = client.vms.clone("web1", CloneRequest(names=(name,), mode=mode))
        installation.finish(task)
    assert knows(installation, "web2")
    assert knows(installation, "web2", "vdb")
    assert client.volumes.get("web2-boot").spec.encrypted
    assert client.volumes.get("web3-boot").spec.encrypted
    with pytest.raises(UnsupportedError, match="encrypted"):
        client.exports.create(ExportCreate(vm="web1"))
    assert in_the_clear(installation) == []

    # A backup is not, and makes encrypted disks again.
    repository = str(place / "backup")
    with pytest.raises(UnsupportedError, match="in the clear"):
        client.backups.create("web1", BackupCreate(repository=repository))
    backup = BackupCreate(repository=repository, decrypt=True)
    installation.finish(client.backups.create("web1", backup))
    restore = RestoreRequest(repository=repository, backup="web1", name="web4")
    installation.finish(client.backups.restore(restore))
    assert in_the_clear(installation) == []
    clear = VolumeClone(name="open", full=True, encrypted=False)
    installation.finish(client.volumes.clone("web4-boot", clear))
    assert len(in_the_clear(installation)) == 1
    installation.finish(client.volumes.remove("open"))

    # Keys are where they are used, and nowhere else.
    said = [(Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in installation.processes()]
    said += [path.read_bytes() for path in (installation.data / "run").rglob("*.json")]
    said += [path.read_bytes() for path in installation.data.glob("store.db*")]
    said.append(installation.log.read_bytes())
    secrets += [key.read_text() for key in keys(installation)]
    assert not [text for text in said for secret in secrets if secret.encode() in text]

    # A copy in the clear is one only when it is asked for.
    for name in ("web1", "web2"):
        installation.finish(client.vms.stop(name, StopRequest(force=True)))
    with pytest.raises(InvalidError):
        client.vms.clone("web1", CloneRequest(names=("open",), encrypted=False))
    installation.finish(client.volumes.detach("thick"))
    copy = VolumeClone(name="open", full=True, encrypted=False)
    installation.finish(client.volumes.clone("thick", copy))
    opened = client.volumes.get("open").status.head
    assert in_the_clear(installation) == [installation.data / "volumes" / f"{opened}.qcow2"]
    installation.finish(client.volumes.clone("open", VolumeClone(name="shut", encrypted=True)))
    installation.finish(client.volumes.flatten("shut"))
    installation.finish(client.volumes.resize("shut", VolumeResize(size=64 * MiB)))
    installation.finish(client.volumes.remove("open"))
    assert in_the_clear(installation) == []
    assert client.hosts.check_volumes().findings == ()

    # Without the key there is nothing to be had, and that is told.
    head = client.volumes.get("shut").status.head
    key = installation.data / "keys" / head
    kept = key.read_bytes()
    key.unlink()
    assert [f.code for f in client.hosts.check_volumes().findings] == ["missing-key"]
    installation.finish(client.volumes.attach("shut", VolumeAttach(vm="web1")))
    failed = installation.finish(client.vms.start("web1"), TaskState.FAILED)
    assert failed.status.error is not None
    assert "key" in failed.status.error.detail
    key.write_bytes(kept)
    installation.finish(client.vms.start("web1"))
    installation.wait_ready("web1")
    assert knows(installation, "web1", at=4)
    assert knows(installation, "web1", "vdb")

    # Keys go with what they open.
    for name in ("web1", "web2", "web3", "web4"):
        installation.finish(client.vms.remove(name, force=True))
    for volume in client.volumes.list():
        installation.finish(client.volumes.remove(volume.meta.name))
    assert keys(installation) == []
    assert layers(installation) == []
    installation.assert_in_order()


def test_what_qemu_img_makes_of_it(installation: Installation) -> None:
    """Our own header is one that others understand."""
    request = VolumeCreate(name="data", size=32 * MiB, encrypt=True)
    installation.finish(installation.client.volumes.create(request))
    (layer,), (key,) = layers(installation), keys(installation)
    answer = subprocess.run(
        ["qemu-img", "info", layer], check=True, capture_output=True, text=True
    ).stdout
    assert "encrypted: yes" in answer
    assert "format: luks" in answer
    assert "cipher alg: aes-256" in answer
    options = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=k,file.filename={layer}"
    for secret, code in ((key.read_text(), 0), ("0" * 64, 1)):
        argv = ["qemu-io", "--object", f"secret,id=k,data={secret}", "--image-opts", options]
        done = subprocess.run([*argv, "-c", "read -P 0 0 32M"], capture_output=True, check=False)
        assert done.returncode == code, done
