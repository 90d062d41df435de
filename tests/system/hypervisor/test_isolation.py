"""What QEMU may reach: the descriptors it is handed, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.system.hypervisor.lab import BOOT_LIMIT, Guest, Lab, eventually, processes_mentioning
from undercroft.hypervisor.firmware import find_firmware
from undercroft.hypervisor.plan import DiskFormat, DiskLayer, PlanDisk, PlanForward, PlanPort
from undercroft.model.errors import UndercroftError
from undercroft.model.vm import Display, Firmware, Machine, PortMode

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can run QEMU as another user")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def has_uefi(secure: bool) -> bool:
    try:
        find_firmware("x86_64", Machine.Q35, secure_boot=secure)
    except UndercroftError:
        return False
    return True


@needs_root
async def test_runs_as_nobody_with_nothing_readable(lab: Lab) -> None:
    """Every file lies where only root can go; it works all the same."""
    lab.base.chmod(0o700)
    image = lab.base / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    image.chmod(0o444)
    disk = PlanDisk(
        path=lab.disk("top.qcow2", 8 << 20).path,
        format=DiskFormat.QCOW2,
        backing=(DiskLayer(path=str(image), format=DiskFormat.QCOW2),),
    )
    guest = await lab.boot(uid=NOBODY, gid=NOBODY, disks=(disk,), display=Display.STD)
    found = status(guest.machine.instance.pid)
    assert found["Uid"].split() == [str(NOBODY)] * 4
    assert found["Gid"].split() == [str(NOBODY)] * 4
    assert found["Groups"] == ""
    assert found["Seccomp"] == "2"
    assert int(found["CapEff"], 16) == 0
    assert guest.machine.instance.uid == NOBODY
    assert await guest.run("echo written > /dev/vda; sync; head -n 1 /dev/vda") == "written"
    environment = Path(f"/proc/{guest.machine.instance.pid}/environ").read_bytes()
    assert b"HOME" not in environment
    assert os.getsid(guest.machine.instance.pid) == guest.machine.instance.pid


async def test_header_of_an_image_leads_nowhere(lab: Lab) -> None:
    secret = lab.base / "secret"
    secret.write_bytes(b"SECRET" * 1000)
    hostile = lab.base / "hostile.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, hostile],
        check=True,
    )
    disk = PlanDisk(path=str(hostile), format=DiskFormat.QCOW2)
    guest = await lab.boot(disks=(disk,))
    pid = guest.machine.instance.pid
    opened = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    assert str(hostile) in opened
    assert str(secret) not in opened
    assert await guest.run("grep -c SECRET /dev/vda") == "0"


async def test_sockets_are_private(lab: Lab) -> None:
    machine = await lab.start()
    run = Path(machine.plan.run_directory)
    assert run.stat().st_mode & 0o777 == 0o700
    for name in ("qmp.sock", "serial.sock", "agent.sock", "output"):
        assert (run / name).stat().st_mode & 0o777 == 0o600


async def test_restricted_network_lets_in_only(lab: Lab) -> None:
    """A forwarded port reaches the guest; the guest reaches nobody, the host least of all."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        number = probe.getsockname()[1]
    forward = PlanForward(guest_port=7777, host_port=number)
    port = PlanPort(mac="52:54:00:00:00:07", mode=PortMode.RESTRICTED, forwards=(forward,))
    with socket.create_server(("127.0.0.1", 0)) as outside:
        outside.setblocking(False)
        guest = await lab.boot(ports=(port,))
        await guest.settled()
        await guest.run("while ! ip addr show eth0 | grep -q 10.0.2; do sleep 0.2; done")
        await guest.run("(while true; do echo f''rom-inside | nc -l -p 7777; done) & true")
        await eventually(lambda: says(number, b"from-inside\n"))
        target = outside.getsockname()[1]
        await guest.run(f"nc -w 2 10.0.2.2 {target} < /dev/null")
        with pytest.raises(BlockingIOError):
            outside.accept()


async def says(number: int, wanted: bytes) -> bool:
    """Connects to a forwarded port. QEMU accepts at once, whoever listens in the guest."""
    reader, writer = await asyncio.open_connection("127.0.0.1", number)
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(10):
            return await reader.readline() == wanted
    writer.close()
    return False


@pytest.mark.skipif(not has_uefi(False), reason="no UEFI firmware installed")
async def test_uefi_keeps_its_variables(lab: Lab) -> None:
    plan = lab.plan(
        firmware=Firmware.UEFI, kernel=None, initrd=None, kernel_arguments="", memory=256 << 20
    )
    machine = await lab.start(plan)
    guest = Guest(machine, await machine.console.attach())
    await guest.until(b"UEFI Interactive Shell")
    nvram = Path(plan.directory) / "nvram.fd"
    await machine.quit()
    written = nvram.read_bytes()
    machine = await lab.start(plan)
    assert nvram.read_bytes()[:4096] == written[:4096]


@pytest.mark.skipif(not has_uefi(True), reason="no UEFI firmware with secure boot installed")
async def test_secure_boot_refuses_the_unsigned_and_the_tpm_ends_with_qemu(lab: Lab) -> None:
    root = os.getuid() == 0
    plan = lab.plan(
        firmware=Firmware.UEFI,
        secure_boot=True,
        tpm=True,
        kernel=None,
        initrd=None,
        kernel_arguments="",
        memory=256 << 20,
        uid=NOBODY if root else None,
        gid=NOBODY if root else None,
    )
    machine = await lab.start(plan)
    [helper] = [pid for pid in processes_mentioning("swtpm") if parent(pid) == os.getpid()]
    if root:
        assert status(helper)["Uid"].split()[0] == str(NOBODY)
    guest = Guest(machine, await machine.console.attach())
    async with asyncio.timeout(BOOT_LIMIT):
        await guest.until(b"Security Violation")
    await machine.kill()
    await eventually(lambda: not Path(f"/proc/{helper}").exists())
    assert list((Path(plan.directory) / "tpm").iterdir())


def parent(pid: int) -> int:
    return int(status(pid)["PPid"])
