"""What a whole Debian does with disks on every bus, and with a drive on SATA, which smaller kernels
do not know."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.system.built_images import content_of
from tests.system.discs import make_disc
from tests.system.hypervisor.lab import Lab, eventually
from undercroft.hypervisor.devices.base import HOT_PORTS
from undercroft.hypervisor.guestagent import GuestAgent
from undercroft.hypervisor.plan import DiskFormat, DiskLayer, PlanCdrom, PlanDisk
from undercroft.model.errors import UndercroftError
from undercroft.model.vm import DiskBus

pytestmark = pytest.mark.timeout(900)
MIB = 1 << 20


async def says(agent: GuestAgent, command: str) -> str:
    result = await agent.exec(("/bin/sh", "-c", command), timeout=120.0)
    return result.stdout.decode().strip()


async def answers(agent: GuestAgent) -> bool:
    try:
        return await says(agent, "echo up") == "up"
    except UndercroftError:
        return False


async def test_sata_and_trim(lab: Lab, debian_image_dir: Path, tmp_path: Path) -> None:
    image = debian_image_dir
    content = content_of(image)
    base = DiskLayer(path=str(image / "disk.qcow2"), format=DiskFormat.QCOW2)
    root = lab.disk("root.qcow2", 4 << 30, backing=(base,), unit=0)
    disks = [root]
    for unit, bus in enumerate(DiskBus, 1):
        disks.append(lab.disk(f"{bus}.qcow2", 128 * MIB, bus=bus, unit=unit, serial=f"on-{bus}"))
    discs = [make_disc(tmp_path / f"{n}.iso", n, what=f"{n}\n".encode()) for n in ("one", "two")]
    machine = await lab.start(
        kernel=str(image / "kernel"),
        initrd=str(image / "initrd"),
        kernel_arguments=f"{content.kernel_arguments} cloud-init=disabled",
        memory=content.defaults.memory,
        cpus=2,
        disks=tuple(disks),
        cdroms=(PlanCdrom(unit=0, path=str(discs[0])),),
        hot_ports=HOT_PORTS,
    )
    agent = machine.agent
    assert agent is not None
    await eventually(lambda: answers(agent), 600.0)

    # What a file system does not need any more is the host's again.
    for disk in disks[1:]:
        assert await trimmed(agent, disk) == "trimmed"

    # A guest that is asked for the disc gives it, and sees the next one.
    look = "mount -r /dev/sr0 /mnt && cat /mnt/what"
    assert await says(agent, look) == "one"
    await machine.change_medium(PlanCdrom(unit=0, node="cd0-1"))
    assert await says(agent, "umount /mnt; cat /sys/block/sr0/size; blkid /dev/sr0") != "one"
    await machine.change_medium(PlanCdrom(unit=0, path=str(discs[1]), node="cd0-2"))
    assert await says(agent, f"{look}; umount /mnt") == "two"


async def trimmed(agent: GuestAgent, disk: PlanDisk) -> str:
    """Whether the file of a disk shrinks when its guest trims the file system on it."""
    find = f"lsblk -dno PATH,SERIAL | awk '$2 == \"{disk.serial}\" {{ print $1 }}'"
    name = await says(agent, find)
    assert name, disk.serial
    fill = (
        f"mkfs.ext4 -q -E nodiscard {name} && mount {name} /mnt && "
        "dd if=/dev/urandom of=/mnt/x bs=1M count=32 2>/dev/null && sync && echo full"
    )
    assert await says(agent, fill) == "full"
    full = os.stat(disk.path).st_blocks * 512
    assert full >= 32 * MIB
    assert await says(agent, "rm /mnt/x && sync && fstrim /mnt && umount /mnt && echo ok") == "ok"
    await eventually(lambda: os.stat(disk.path).st_blocks * 512 <= full - 30 * MIB)
    return "trimmed"
