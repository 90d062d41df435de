"""Disks that come and go, grow and are held back while their guest runs."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from tests.system.daemon.installation import Installation, until, wait_gone
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
from undercroft.model.vm import DiskBus, RestartPolicy
from undercroft.model.volume import IOLimits, Volume

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


def test_disks_come_grow_and_go_on_every_bus(installation: Installation) -> None:
    volumes, vms = installation.client.volumes, installation.client.vms
    buses = {"v1": DiskBus.VIRTIO, "s1": DiskBus.SCSI, "n1": DiskBus.NVME}
    installation.run("web1")

    def returned(volume: str, most: int) -> bool:
        return allocated(installation, volume) <= most

    def seen_as(name: str, size: int) -> bool:
        return installation.shell("web1", f"cat /sys/block/{name}/size") == str(size // 512)

    content = {}
    for volume, bus in buses.items():
        make(installation, volume)
        installation.finish(volumes.attach(volume, VolumeAttach(vm="web1", bus=bus)))
        name = wait_device(installation, "web1", volume)
        installation.shell("web1", f"dd if=/dev/urandom of=/dev/{name} bs=1M count=6; sync")
        # What is discarded is the host's again.
        full = allocated(installation, volume)
        assert full >= 6 * MIB
        assert installation.shell("web1", f"blkdiscard -o 2M -l 4M /dev/{name} && echo ok") == "ok"
        until(partial(returned, volume, full - 3 * MIB), "the room is given back")
        content[volume] = installation.shell("web1", f"head -c 6M /dev/{name} | sha256sum")

    installation.kill()  # whoever comes next must find it all
    installation.start()
    failed = installation.finish(
        volumes.resize("n1", VolumeResize(by=32 * MIB)), TaskState.FAILED
    ).status.error
    assert failed is not None
    assert failed.code == "unsupported"
    with pytest.raises(UnsupportedError, match="NVMe"):
        vms.suspend("web1")
    for volume in ("v1", "s1"):
        installation.finish(volumes.resize(volume, VolumeResize(by=32 * MIB)))
        assert volumes.get(volume).spec.size == 96 * MIB
        name = device(installation, "web1", volume)
        if volume == "s1":  # the guest looks when it next asks the disk anything
            installation.shell("web1", f"echo 1 > /sys/block/{name}/device/rescan")
        until(partial(seen_as, name, 96 * MIB), "the guest sees it")
    installation.finish(volumes.detach("n1"))
    assert device(installation, "web1", "n1") == ""
    assert volumes.get("n1").spec.attached is None

    def took() -> float:
        """Seconds of the guest's for writing 2 MiB to where nothing is."""
        name = device(installation, "web1", "v1")
        text = installation.shell(
            "web1",
            f"cut -d' ' -f1 /proc/uptime;"
            f"dd if=/dev/zero of=/dev/{name} seek=64 bs=256k count=8 oflag=direct;"
            f"cut -d' ' -f1 /proc/uptime",
        )
        begun, ended = map(float, text.split())
        return ended - begun

    installation.finish(volumes.set("v1", VolumeChange(bandwidth=MIB)))
    assert took() > 1  # not how quick it is, but that it is not quicker
    # A machine that is begun anew, also from its saved state, is the one that it had become.
    installation.finish(vms.suspend("web1"))
    installation.finish(vms.start("web1"))
    assert took() > 1
    installation.finish(vms.stop("web1", StopRequest(force=True)))
    installation.finish(volumes.set("v1", VolumeChange(bandwidth=0, iops=6)))
    installation.finish(vms.start("web1"))
    installation.wait_ready("web1")
    assert took() > 1
    installation.finish(volumes.set("v1", VolumeChange(iops=0)))
    assert volumes.get("v1").spec.limits == IOLimits()
    for volume in ("v1", "s1"):
        name = device(installation, "web1", volume)
        seen = installation.shell("web1", f"head -c 6M /dev/{name} | sha256sum")
        assert seen == content[volume]
        installation.finish(volumes.detach(volume))
    installation.finish(vms.remove("web1", force=True))
    assert sorted(v.meta.name for v in volumes.list()) == sorted(buses)
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


def test_what_is_cut_off_is_finished(installation: Installation) -> None:
    volumes, vms = installation.client.volumes, installation.client.vms
    make(installation, "data1")
    installation.run("web1", restart=RestartPolicy.ALWAYS)
    for verb in ("attach", "detach", "attach", "resize"):
        if verb == "attach":
            task = volumes.attach("data1", VolumeAttach(vm="web1", bus=DiskBus.SCSI))
        elif verb == "detach":
            task = volumes.detach("data1")
        else:
            task = volumes.resize("data1", VolumeResize(by=MIB))
        installation.kill()
        installation.start()
        installation.finish(task)
        if verb == "attach":
            wait_device(installation, "web1", "data1")
        elif verb == "detach":
            assert device(installation, "web1", "data1") == ""
    # QEMU dies: the next one begins without what was to go, and with what was to come.
    for verb, wanted in (("detach", False), ("attach", True)):
        [pid] = installation.processes()
        if verb == "detach":
            task = volumes.detach("data1")
        else:
            task = volumes.attach("data1", VolumeAttach(vm="web1"))
        os.kill(pid, signal.SIGKILL)
        installation.finish(task)
        wait_gone(pid)
        installation.wait_ready("web1")
        assert bool(device(installation, "web1", "data1")) is wanted
        assert (volumes.get("data1").spec.attached is not None) is wanted
    installation.finish(volumes.detach("data1"))

    # What cannot be done while it runs is said, and leaves all as it is.
    sata = VolumeAttach(vm="web1", bus=DiskBus.SATA)
    failed = installation.finish(volumes.attach("data1", sata), TaskState.FAILED).status.error
    assert failed is not None
    assert failed.code == "unsupported"
    assert volumes.get("data1").spec.attached is None
    assert vms.get("web1").status.state == "running"
    installation.finish(vms.stop("web1", StopRequest(force=True)))
    installation.finish(volumes.attach("data1", sata))
    installation.finish(vms.start("web1"))  # its kernel knows no SATA
    installation.finish(volumes.detach("data1"), TaskState.FAILED)
    assert volumes.get("data1").spec.attached is not None
    installation.finish(vms.remove("web1", force=True))
    assert volumes.get("data1").spec.attached is None
    installation.assert_in_order()
