"""The host's disk fills up while a guest writes: it is paused, loses nothing, and goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation, until
from undercroft.model.requests import NewDisk, VMCreate, VolumeAttach, VolumeCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import VM, DiskBus

SIZE = 256 << 20
MIB = 1 << 20
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@pytest.fixture
def small(place: Path, tiny_image_dir: Path) -> Iterator[Installation]:
    """An installation on a disk of `SIZE` bytes."""
    data = place / "data"
    data.mkdir(mode=0o711)
    options = f"size={SIZE},mode=711"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "croft", data], check=True)
    installation = Installation(data)
    try:
        installation.add_image(tiny_image_dir)
        installation.start()
        yield installation
    finally:
        installation.close()
        subprocess.run(["umount", "--lazy", data], check=True)


def fill(installation: Installation, leave: int) -> Path:
    """Takes all room but ``leave`` bytes."""
    filler = installation.data / "cache" / "filler"
    usage = os.statvfs(installation.data)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, usage.f_bavail * usage.f_frsize - leave)
    return filler


def test_a_guest_that_fills_the_disk_is_paused_and_goes_on(small: Installation) -> None:
    small.run("web1", disk=1 << 30, disks=(NewDisk(size=1 << 30, bus=DiskBus.SCSI),))
    volumes = small.client.volumes
    small.shell("web1", "dd if=/dev/urandom of=/tmp/in bs=1M count=20 2>/dev/null")

    def paused() -> VM | None:
        vm = small.client.vms.get("web1")
        return vm if vm.status.state == "paused" else None

    # QEMU pauses it at the last write that finds room; one with an NVMe disk we pause before that.
    for name, leave in (("sda", 8), ("vda", 8), ("nvme0n1", 20)):
        if name == "nvme0n1":
            small.finish(volumes.create(VolumeCreate(name="fast", size=1 << 30)))
            small.finish(volumes.attach("fast", VolumeAttach(vm="web1", bus=DiskBus.NVME)))
            until(lambda: small.shell("web1", "[ -b /dev/nvme0n1 ] && echo yes"), "it is there")
        filler = fill(small, leave * MIB)
        small.in_background("web1", f"cat /tmp/in > /dev/{name}; sync; echo ok > /tmp/{name}")
        vm = until(paused, "the guest is paused")
        assert "full" in (vm.status.message or "")
        assert len(small.processes()) == 1
        if name == "vda":
            task = small.client.vms.create(VMCreate(name="web2", image="tiny", disk=1 << 30))
            failed: Task = small.finish(task, TaskState.FAILED)
            assert failed.status.error is not None
            assert failed.status.error.code == "no-space"
            assert [v.meta.name for v in small.client.vms.list()] == ["web1"]
        else:  # whoever comes next lets it go on
            small.kill()
            small.start()
            until(paused, "the guest is still paused")
        filler.unlink()
        small.wait_state("web1", "running")
        until(partial(small.shell, "web1", f"cat /tmp/{name} 2>/dev/null"), "all is written")
        small.shell("web1", "echo 3 > /proc/sys/vm/drop_caches")
        compare = f"head -c 20971520 /dev/{name} | cmp - /tmp/in && echo same"
        assert small.shell("web1", compare) == "same"
        small.shell("web1", f"blkdiscard /dev/{name}")
    small.assert_in_order()


def test_a_full_disk_keeps_nobody_from_looking_and_removing(small: Installation) -> None:
    small.run("web1", disk=1 << 30, ready=False)
    filler = fill(small, 0)
    assert small.client.vms.get("web1").status.state == "running"
    small.kill()
    small.start()
    assert small.client.vms.get("web1").status.state == "running"
    small.finish(small.client.vms.remove("web1", force=True))
    assert small.client.vms.list() == []
    assert small.processes() == {}
    filler.unlink()
    small.assert_in_order()
