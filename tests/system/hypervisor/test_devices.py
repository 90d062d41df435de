"""QEMU takes every kind of machine that a plan can describe, and guests find the devices."""

from __future__ import annotations

import asyncio
import shutil
import struct
from typing import Any

import pytest

from tests.system.hypervisor.lab import BOOT_LIMIT, Lab
from undercroft.hypervisor.emulator import find_emulator
from undercroft.hypervisor.plan import PlanPort
from undercroft.model.vm import DiskBus, Display, Firmware, Machine, NicModel, PortMode
from undercroft.model.volume import IOLimits

FROM_DISK: dict[str, Any] = {
    "firmware": Firmware.BIOS,
    "kernel": None,
    "initrd": None,
    "kernel_arguments": "",
}


def port(number: int, model: NicModel = NicModel.VIRTIO) -> PlanPort:
    mac = f"52:54:00:00:00:{number:02x}"
    return PlanPort(mac=mac, mode=PortMode.RESTRICTED, model=model, hostname="web1")


async def test_many_disks_and_adapters_reach_the_guest(lab: Lab) -> None:
    """More than there are slots; each disk with its serial number."""
    disks = tuple(lab.disk(f"d{n}.qcow2", 1 << 20, serial=f"vol{n}") for n in range(14))
    guest = await lab.boot(disks=disks, ports=tuple(port(n) for n in range(8)))
    await guest.settled()
    serials = await guest.run("cat /sys/block/vd*/serial | tr -d '\\n'")
    assert sorted(serials.removeprefix("vol").split("vol")) == sorted(map(str, range(14)))
    macs = await guest.run("cat /sys/class/net/eth*/address")
    assert sorted(macs.split()) == [f"52:54:00:00:00:{n:02x}" for n in range(8)]


@pytest.mark.parametrize("bus", DiskBus)
async def test_every_bus(lab: Lab, bus: DiskBus) -> None:
    disks = tuple(lab.disk(f"d{n}.qcow2", 1 << 20, bus=bus, serial=f"s{n}") for n in range(3))
    machine = await lab.start(disks=disks)
    stats = await machine.stats()
    assert stats.disk_writes == 0

    async def limits() -> list[tuple[int, int]]:
        found = await machine._monitor.execute("query-block")
        held = (entry["inserted"] for entry in found if "disk1-dev" in str(entry.get("qdev")))
        return [(one["iops"], one["bps_wr"]) for one in held]

    await machine.limit(1, IOLimits(iops=100, write_bandwidth=1 << 20))
    assert await limits() == [(100, 1 << 20)]
    await machine.limit(1, IOLimits())
    assert await limits() == [(0, 0)]


@pytest.mark.parametrize("display", [Display.STD, Display.VIRTIO])
async def test_desktop_without_virtio(lab: Lab, display: Display) -> None:
    seed = lab.base / "seed.iso"
    seed.write_bytes(bytes(64 << 10))
    machine = await lab.start(
        **FROM_DISK,
        disks=(lab.disk("d.qcow2", 1 << 20, bus=DiskBus.SATA, boot_index=0),),
        seed=str(seed),
        ports=(port(1, NicModel.E1000E),),
        display=display,
        vmgenid="324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
        agent=False,
        rng=False,
        balloon=False,
        cpus=2,
    )
    assert machine.agent is None
    assert (await machine.stats()).guest_memory is None
    assert (await machine.screenshot()).startswith(b"\x89PNG")


@pytest.mark.parametrize("version", ["7.2", "9.0"])
async def test_older_board(lab: Lab, version: str) -> None:
    machine = await lab.start(machine_version=version)
    assert machine.plan.machine_version == version


@pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="no QEMU for ARM")
async def test_another_architecture(lab: Lab) -> None:
    """A kernel of five instructions, which says A."""
    kernel = lab.base / "kernel"
    kernel.write_bytes(
        struct.pack(
            "<5I",
            0xD2A12000,  # movz x0, #0x0900, lsl #16: the PL011
            0x52800821,  # movz w1, #'A'
            0x39000001,  # strb w1, [x0]
            0xD503207F,  # wfi
            0x17FFFFFF,  # b -4
        )
    )
    lab.emulator = await find_emulator("aarch64")
    machine = await lab.start(
        arch="aarch64",
        machine=Machine.VIRT,
        disks=(lab.disk("d.qcow2", 1 << 20),),
        ports=(port(1),),
        display=Display.VIRTIO,
        kernel=str(kernel),
        initrd=None,
    )
    session = await machine.console.attach()
    assert await asyncio.wait_for(anext(aiter(session)), BOOT_LIMIT) == b"A"
    assert machine.plan.machine_version == "{}.{}".format(*lab.emulator.version)
    assert (await machine.quit()).hint == "quit"
