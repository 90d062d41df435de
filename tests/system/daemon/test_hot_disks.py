"""Disks that come and go, grow and are held back while their guest runs."""

from __future__ import annotations

import pytest

from tests.system.daemon.installation import Installation, until
from undercroft.model.errors import UnsupportedError
from undercroft.model.requests import (
    CloneMode,
    CloneRequest,
    NewDisk,
    RevertRequest,
    SnapshotCreate,
    StopRequest,
    VolumeAttach,
    VolumeChange,
    VolumeCreate,
    VolumeResize,
    VolumeUse,
)
from undercroft.model.task import TaskState
from undercroft.model.vm import DiskBus
from undercroft.model.volume import Volume

MIB = 1 << 20
# A disk's serial number is in its own place on each bus.
FIND = """
for disk in /sys/block/*; do
    [ -b /dev/$(basename $disk) ] || continue
    id=$(cat $disk/serial $disk/device/serial; tail -c +5 $disk/device/vpd_pg80)
    case "$id" in *%s*) basename $disk; exit;; esac
done 2>/dev/null
"""


def serial(installation: Installation, volume: str) -> str:
    return installation.client.volumes.get(volume).meta.id.removeprefix("vol-")


def device(installation: Installation, vm: str, volume: str) -> str:
    """What the guest calls a disk; empty if it has no such one."""
    return installation.shell(vm, FIND % serial(installation, volume)[:20])


def wait_device(installation: Installation, vm: str, volume: str) -> str:
    return until(lambda: device(installation, vm, volume), f"{vm} has {volume}")


def make(installation: Installation, name: str, size: int = 64 * MIB) -> Volume:
    installation.finish(installation.client.volumes.create(VolumeCreate(name=name, size=size)))
    return installation.client.volumes.get(name)


def allocated(installation: Installation, volume: str) -> int:
    head = installation.client.volumes.get(volume).status.head
    return (installation.data / "volumes" / f"{head}.qcow2").stat().st_blocks * 512


@pytest.mark.parametrize("bus", [DiskBus.VIRTIO, DiskBus.SCSI, DiskBus.NVME])
def test_a_disk_comes_grows_and_goes_on_every_bus(installation: Installation, bus: DiskBus) -> None:
    volumes = installation.client.volumes
    make(installation, "data1")
    installation.run("web1")
    installation.finish(volumes.attach("data1", VolumeAttach(vm="web1", bus=bus)))
    name = wait_device(installation, "web1", "data1")
    write = f"dd if=/dev/urandom of=/dev/{name} bs=1M count=8 conv=fsync 2>/dev/null"
    installation.shell("web1", write)
    total = installation.shell("web1", f"head -c 8M /dev/{name} | sha256sum")
    full = allocated(installation, "data1")
    assert full >= 8 * MIB

    # What is discarded is the host's again.
    assert installation.shell("web1", f"blkdiscard -o 4M -l 4M /dev/{name} && echo ok") == "ok"
    until(lambda: allocated(installation, "data1") <= full - 3 * MIB, "the room is given back")
    installation.shell("web1", f"dd if=/dev/urandom of=/dev/{name} bs=1M count=8 2>/dev/null; sync")
    total = installation.shell("web1", f"head -c 8M /dev/{name} | sha256sum")

    installation.kill()  # whoever comes next must find it all
    installation.start()
    if bus is DiskBus.NVME:
        task = volumes.resize("data1", VolumeResize(by=32 * MIB))
        refused = installation.finish(task, TaskState.FAILED).status.error
        assert refused is not None
        assert refused.code == "unsupported"
        with pytest.raises(UnsupportedError, match="NVMe"):
            installation.client.vms.suspend("web1")
        installation.finish(volumes.detach("data1"))
        installation.finish(volumes.resize("data1", VolumeResize(by=32 * MIB)))
        installation.finish(volumes.attach("data1", VolumeAttach(vm="web1", bus=bus)))
        name = wait_device(installation, "web1", "data1")
    else:
        installation.finish(volumes.resize("data1", VolumeResize(by=32 * MIB)))
    assert volumes.get("data1").spec.size == 96 * MIB
    if bus is DiskBus.SCSI:  # the guest looks when it next asks the disk anything
        installation.shell("web1", f"echo 1 > /sys/block/{name}/device/rescan")
    sectors = str(96 * MIB // 512)
    until(
        lambda: installation.shell("web1", f"cat /sys/block/{name}/size") == sectors,
        "the guest sees it grow",
    )
    if bus is DiskBus.VIRTIO:
        installation.finish(volumes.detach("data1"))
        assert device(installation, "web1", "data1") == ""
        assert volumes.get("data1").spec.attached is None
        installation.finish(volumes.attach("data1", VolumeAttach(vm="web1", bus=DiskBus.SCSI)))
        name = wait_device(installation, "web1", "data1")
    assert installation.shell("web1", f"head -c 8M /dev/{name} | sha256sum") == total

    # A machine that is begun anew from its saved state is the one that it had become.
    if bus is not DiskBus.NVME:
        installation.finish(installation.client.vms.suspend("web1"))
        installation.finish(installation.client.vms.start("web1"))
        assert installation.shell("web1", f"head -c 8M /dev/{name} | sha256sum") == total
    installation.finish(installation.client.vms.stop("web1", StopRequest(force=True)))
    installation.finish(installation.client.vms.start("web1"))
    installation.wait_ready("web1")
    name = wait_device(installation, "web1", "data1")
    assert installation.shell("web1", f"head -c 8M /dev/{name} | sha256sum") == total
    installation.finish(volumes.detach("data1"))
    installation.finish(installation.client.vms.remove("web1", force=True))
    assert [v.meta.name for v in volumes.list()] == ["data1"]
    installation.finish(volumes.remove("data1"))
    installation.assert_in_order()


def test_several_disks_from_the_beginning_with_snapshots_and_clones(
    installation: Installation,
) -> None:
    volumes, vms = installation.client.volumes, installation.client.vms
    make(installation, "data1")
    make(installation, "data2")
    installation.run(
        "web1",
        disk=32 * MIB,
        disks=(NewDisk(size=48 * MIB, bus=DiskBus.SCSI),),
        volumes=(VolumeUse(volume="data1", bus=DiskBus.SCSI),),
    )
    for volume in ("web1-boot", "web1-disk2", "data1"):
        name = wait_device(installation, "web1", volume)
        installation.shell("web1", f"echo before {volume} > /dev/{name}; sync")
    installation.finish(
        installation.client.snapshots.create("web1", SnapshotCreate(name="one", memory=True))
    )
    installation.finish(volumes.attach("data2", VolumeAttach(vm="web1")))
    name = wait_device(installation, "web1", "data2")
    installation.shell("web1", f"echo later data2 > /dev/{name}; sync")
    installation.finish(volumes.resize("data1", VolumeResize(size=80 * MIB)))
    name = device(installation, "web1", "data1")
    installation.shell("web1", f"echo after > /dev/{name}; sync")
    installation.finish(installation.client.snapshots.create("web1", SnapshotCreate(name="two")))

    # An instant clone has them all, at once and as its own.
    task = vms.clone("web1", CloneRequest(names=("web2",), mode=CloneMode.INSTANT))[0]
    installation.finish(task)
    installation.wait_ready("web2")
    assert installation.shell("web2", f"head -n1 /dev/{name}") == "after"
    installation.shell("web2", f"echo clone > /dev/{name}; sync")
    assert installation.shell("web1", f"head -n1 /dev/{name}") == "after"
    installation.finish(vms.remove("web2", force=True))

    # Going back: the disks, their sizes, and which ones there are.
    installation.finish(
        installation.client.snapshots.revert("web1", "one", RevertRequest(force=True))
    )
    installation.wait_ready("web1")
    for volume in ("web1-boot", "web1-disk2", "data1"):
        name = device(installation, "web1", volume)
        assert installation.shell("web1", f"head -n1 /dev/{name}") == f"before {volume}"
    assert volumes.get("data1").spec.size == 64 * MIB
    assert device(installation, "web1", "data2") == ""
    assert volumes.get("data2").spec.attached is None
    installation.finish(vms.remove("web1", force=True))
    assert sorted(v.meta.name for v in volumes.list()) == ["data1", "data2"]
    installation.finish(volumes.remove("data1"))
    installation.finish(volumes.remove("data2"))
    installation.assert_in_order()


def test_limits_hold_at_once_and_after_a_restart(installation: Installation) -> None:
    volumes = installation.client.volumes
    make(installation, "data1")
    installation.run("web1", volumes=(VolumeUse(volume="data1"),))
    name = wait_device(installation, "web1", "data1")

    def took() -> float:
        """Seconds for writing 4 MiB."""
        text = installation.shell(
            "web1",
            f"a=$(cut -d' ' -f1 /proc/uptime);"
            f"dd if=/dev/zero of=/dev/{name} bs=256k count=16 oflag=direct 2>/dev/null;"
            f"b=$(cut -d' ' -f1 /proc/uptime); echo $a $b",
        )
        begun, ended = map(float, text.split())
        return ended - begun

    installation.finish(volumes.set("data1", VolumeChange(bandwidth=MIB)))
    assert took() > 2  # not how quick it is, but that it is not quicker
    installation.kill()
    installation.start()
    installation.finish(installation.client.vms.stop("web1", StopRequest(force=True)))
    installation.finish(installation.client.vms.start("web1"))
    installation.wait_ready("web1")
    name = wait_device(installation, "web1", "data1")
    assert took() > 2
    installation.finish(volumes.set("data1", VolumeChange(bandwidth=0, iops=4)))
    assert took() > 2
    installation.finish(volumes.set("data1", VolumeChange(iops=0)))
    assert volumes.get("data1").spec.limits.iops == 0


def test_what_cannot_be_is_said_and_leaves_nothing(installation: Installation) -> None:
    volumes = installation.client.volumes
    make(installation, "data1")
    installation.run("web1")
    task = volumes.attach("data1", VolumeAttach(vm="web1", bus=DiskBus.SATA))
    failed = installation.finish(task, TaskState.FAILED)
    assert failed.status.error is not None
    assert failed.status.error.code == "unsupported"
    assert volumes.get("data1").spec.attached is None
    assert installation.client.vms.get("web1").status.state == "running"
    # Off, it may have it.
    installation.finish(installation.client.vms.stop("web1", StopRequest(force=True)))
    installation.finish(volumes.attach("data1", VolumeAttach(vm="web1", bus=DiskBus.SATA)))
    installation.finish(installation.client.vms.start("web1"))  # its kernel knows no SATA
    failed = installation.finish(volumes.detach("data1"), TaskState.FAILED)
    assert volumes.get("data1").spec.attached is not None
