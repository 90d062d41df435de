"""A datastore beside the data directory: filled, unmounted, mounted again, removed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation, until
from undercroft.model.errors import AlreadyExistsError, InUseError, UnavailableError
from undercroft.model.layer import LayerFormat
from undercroft.model.requests import (
    CloneRequest,
    DatastoreCreate,
    StopRequest,
    VolumeClone,
    VolumeCreate,
)
from undercroft.model.task import TaskState
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import VM

SIZE = 200 * MiB
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@pytest.fixture
def disk(place: Path) -> Iterator[Path]:
    """A file system of `SIZE` bytes."""
    path = place / "fast"
    path.mkdir()
    options = f"size={SIZE},mode=711"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "croft", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def events(installation: Installation) -> list[str]:
    return [event.type for event in installation.client.events.list()]


def test_a_datastore_from_its_first_day_to_its_last(
    installation: Installation, disk: Path, place: Path
) -> None:
    client = installation.client
    fast = client.datastores.create(
        DatastoreCreate(name="fast", path=str(disk), default=True, warning=0.6)
    )
    assert 0.9 * SIZE <= fast.status.capacity <= SIZE
    with pytest.raises(AlreadyExistsError):
        client.datastores.create(DatastoreCreate(name="again", path=str(disk)))
    installation.run("web1", disk=GiB)
    assert client.volumes.get("web1-boot").status.datastore == fast.meta.id
    assert len(list(disk.glob("*.qcow2"))) == 1
    # Linked beside its source, and what it lies on in another place.
    tasks = client.vms.clone("web1", CloneRequest(names=("web2",), datastore="local"))
    installation.finish(tasks[0])
    local = client.datastores.get("local")
    assert client.volumes.get("web2-boot").status.datastore == local.meta.id
    request = VolumeCreate(name="raw", size=16 * MiB, preallocate=True, format=LayerFormat.RAW)
    installation.finish(client.volumes.create(request))
    (raw,) = disk.glob("*.raw")
    assert raw.stat().st_blocks * 512 >= 16 * MiB
    raw.write_bytes(os.urandom(16 * MiB))
    installation.finish(client.volumes.clone("raw", VolumeClone(name="copy", full=True)))
    head = disk / f"{client.volumes.get('copy').status.head}.qcow2"
    compare: list[str | Path] = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, head]
    subprocess.run(compare, check=True, capture_output=True)
    for name in ("copy", "raw"):
        installation.finish(client.volumes.remove(name))
    status = client.datastores.get("fast").status
    assert status.provisioned == GiB
    assert 5 < status.provisioned / status.capacity < 6

    # Somebody is told before it is full; then the guest stands still, and goes on.
    filler = disk / "filler"
    with filler.open("wb") as file:
        usage = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, usage.f_bavail * usage.f_frsize - 4 * MiB)
    told = until(lambda: client.datastores.get("fast").status.message, "it is told")
    assert "times the capacity" in told
    assert "datastore.filling" in events(installation)
    installation.shell("web1", "yes a disk | head -c 12582912 > /tmp/in")
    installation.in_background("web1", "cat /tmp/in > /dev/vda; sync; echo ok > /tmp/done")

    def paused() -> VM | None:
        vm = client.vms.get("web1")
        return vm if vm.status.state == "paused" else None

    vm = until(paused, "the guest is paused")
    assert "datastore fast is full" in (vm.status.message or "")
    filler.unlink()
    installation.wait_state("web1", "running")
    until(lambda: installation.shell("web1", "cat /tmp/done 2>/dev/null"), "all is written")
    installation.shell("web1", "echo 3 > /proc/sys/vm/drop_caches")
    compared = installation.shell("web1", "head -c 12582912 /dev/vda | cmp - /tmp/in && echo same")
    assert compared == "same"

    # Not there: nothing is made in its place, and nothing is taken for lost.
    installation.finish(client.vms.stop("web1", StopRequest(force=True)))
    away = place / "away"
    away.mkdir()
    subprocess.run(["mount", "--bind", disk, away], check=True)
    try:
        subprocess.run(["umount", disk], check=True)
        failed = installation.finish(client.vms.start("web1"), TaskState.FAILED)
        assert failed.status.error is not None
        assert failed.status.error.code == "unavailable"
        until(lambda: client.datastores.get("fast").status.state == "unavailable", "it is away")
        with pytest.raises(UnavailableError, match="not mounted"):
            client.volumes.create(VolumeCreate(name="data", size=GiB))
        codes = [finding.code for finding in client.hosts.check_volumes(repair=True).findings]
        assert codes == ["datastore-unavailable"]
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["mount", "--move", away, disk], check=False)
        if not os.path.ismount(disk):
            subprocess.run(["mount", "--bind", away, disk], check=True)
            subprocess.run(["umount", away], check=True)
    until(lambda: client.datastores.get("fast").status.state == "ready", "it is there again")
    installation.finish(client.vms.start("web1"))

    # Two VMs need it, one of them only for what it lies on.
    installation.finish(client.vms.remove("web1", force=True))
    with pytest.raises(InUseError, match="web2-boot"):
        client.datastores.remove("fast")
    installation.finish(client.volumes.flatten("web2-boot"))
    client.datastores.remove("fast")
    assert list(disk.iterdir()) == []
    assert client.datastores.get("local").spec.default
    installation.assert_in_order()
