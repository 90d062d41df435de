"""Discs that come to a running guest and go from it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tests.system.discs import make_bootable, make_disc
from tests.system.hypervisor.lab import Guest, Lab, eventually
from undercroft.hypervisor.blockgraph import block_nodes
from undercroft.hypervisor.devices.base import HOT_PORTS
from undercroft.hypervisor.launch import read_plan
from undercroft.hypervisor.machine import QemuMachine
from undercroft.hypervisor.plan import PlanCdrom
from undercroft.model.errors import InUseError, InvalidError, NotFoundError
from undercroft.model.vm import DiskBus, Firmware

EMPTY = "none"


async def holds(guest: Guest, name: str = "sr0") -> str:
    """What a guest reads off the disc."""
    found = await guest.run(f"look {name}")
    return found.strip()


async def learn_to_look(guest: Guest) -> None:
    """Lines that are too long for the terminal would come back in pieces, and the kernel would
    say what it finds, too."""
    await guest.run("echo 1 > /proc/sys/kernel/printk")
    await guest.run(f"see() {{ cat /mnt/what; umount /mnt; }}; no() {{ echo {EMPTY}; }}")
    await guest.run("look() { mount -r /dev/$1 /mnt 2>/dev/null && see || no; }")


async def opened(machine: QemuMachine) -> set[str]:
    """The discs that QEMU has open."""
    return {node for node in await block_nodes(machine._monitor) if node.startswith("cd")}


async def sets(machine: QemuMachine) -> int:
    return len(await machine._monitor.execute("query-fdsets"))


async def test_discs_come_and_go(lab: Lab, tmp_path: Path) -> None:
    bus = DiskBus.SCSI  # the guest's kernel knows no SATA
    one = make_disc(tmp_path / "one.iso", "ONE", what=b"one\n")
    two = make_disc(tmp_path / "two, again.iso", "TWO", what=b"two\n")
    drive = PlanCdrom(unit=0, bus=bus, path=str(one))
    other = PlanCdrom(unit=1, bus=bus)
    guest = await lab.boot(cdroms=(drive, other))
    machine = guest.machine
    await guest.settled()
    await learn_to_look(guest)
    await eventually(lambda: _there(guest))
    assert await holds(guest) == "one"
    before = await sets(machine)

    async def change(path: Path | None, node: str, *, force: bool = False, unit: int = 0) -> None:
        wanted = PlanCdrom(unit=unit, bus=bus, path=str(path) if path else None, node=node)
        for _ in range(2):  # what is done may be done again
            await machine.change_medium(wanted, force=force)

    await change(two, "cd0-1")
    assert await holds(guest) == "two"
    assert await opened(machine) == {"cd0-1", "cd0-1-file"}
    await change(None, "cd0-2")
    assert await holds(guest) == EMPTY
    assert await opened(machine) == set()
    assert await sets(machine) == before - 1
    # The same file as another disc: it is read anew.
    make_disc(one, "ONE", what=b"one, later\n")
    await change(one, "cd0-z3")
    assert await holds(guest) == "one, later"

    # What cannot be leaves what is.
    text = tmp_path / "text.iso"
    text.write_bytes(b"CD001" * 40000)
    for bad, error in (
        (tmp_path / "none.iso", NotFoundError),
        (tmp_path, InvalidError),
        (text, InvalidError),
    ):
        with pytest.raises(error, match=str(bad)):
            await change(bad, "cd0-x4")
    assert await holds(guest) == "one, later"
    assert await opened(machine) == {"cd0-z3", "cd0-z3-file"}

    # A guest that uses the disc keeps it, unless it is pulled out.
    await guest.run("mount -r /dev/sr0 /mnt")
    with pytest.raises(InUseError, match="locked"):
        await change(None, "cd0-5")
    assert await guest.run("cat /mnt/what") == "one, later"
    assert read_plan(Path(machine.plan.run_directory)).cdroms[0].path == str(one)
    await change(two, "cd0-6", force=True)
    await guest.run("umount /mnt")
    assert await holds(guest) == "two"
    # One that opened the drive itself finds it closed again.
    await guest.run("eject /dev/sr0")
    await change(one, "cd0-7")
    assert await holds(guest) == "one, later"
    await change(two, "cd1-8", unit=1)
    assert await holds(guest, "sr1") == "two"
    plan = read_plan(Path(machine.plan.run_directory))
    assert [(known.unit, known.path) for known in plan.cdroms] == [(0, str(one)), (1, str(two))]

    # One that goes on from its saved state has them still, and can have others.
    state = lab.base / "state"
    await machine.suspend(state)
    plan = msgspec.structs.replace(machine.plan, incoming=str(state))
    machine = await lab.start(plan)
    guest = Guest(machine, await machine.console.attach())
    await guest.type("")
    await guest.until(b"# ")
    assert await holds(guest) == "one, later"
    await change(two, "cd0-9")
    assert await holds(guest) == "two"


async def _there(guest: Guest) -> bool:
    return "sr1" in await guest.run("ls /dev")


async def test_what_is_no_disc_keeps_a_machine_from_starting(lab: Lab, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(InvalidError, match="not a plain file"):
        await lab.start(cdroms=(PlanCdrom(unit=0, path=str(fifo)),))
    assert lab.left_behind() == []


@pytest.mark.parametrize(
    ("firmware", "bus", "says"),
    [
        (Firmware.BIOS, DiskBus.SATA, b"BIOS-DISC"),
        (Firmware.BIOS, DiskBus.SCSI, b"BIOS-DISC"),
        (Firmware.UEFI, DiskBus.SATA, b"EFI-DISC"),
    ],
)
async def test_an_empty_disk_leads_to_the_disc(
    lab: Lab, tmp_path: Path, firmware: Firmware, bus: DiskBus, says: bytes
) -> None:
    disc = make_bootable(tmp_path / "boot.iso")
    machine = await lab.start(
        firmware=firmware,
        kernel=None,
        initrd=None,
        kernel_arguments="",
        disks=(lab.disk("empty.qcow2", 1 << 20, boot_index=0, unit=0),),
        cdroms=(
            PlanCdrom(unit=0, boot_index=16),
            PlanCdrom(unit=1, bus=bus, path=str(disc), boot_index=17),
        ),
        hot_ports=HOT_PORTS,
    )
    guest = Guest(machine, await machine.console.attach(scrollback=1 << 16))
    await guest.until(says)
