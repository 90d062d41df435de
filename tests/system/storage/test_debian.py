"""`debian:12` really boots: directly, by BIOS, and by UEFI with secure boot."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.system.bare_guest import BareGuest, bare_guest
from tests.system.built_images import content_of
from undercroft.model.errors import InvalidError, MissingToolError
from undercroft.model.vm import Guest
from undercroft.storage.build.debian import build_debian
from undercroft.storage.seed import write_seed

pytestmark = pytest.mark.timeout(900)

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMjRUBxdlnQKT4mXQXcSSNI6FAGYDHBQqVxZVnwyGuxY alice@test"
OVMF = Path("/usr/share/OVMF")


@asynccontextmanager
async def debian(
    image: Path, directory: Path, *options: str, machine: str = "q35"
) -> AsyncIterator[BareGuest]:
    """A Debian on a larger overlay, with a seed that makes alice."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", image / "disk.qcow2", "-F", "qcow2",
         directory / "disk.qcow2", "4G"],
        check=True,
    )  # fmt: skip
    guest = Guest(
        user="alice", ssh_keys=(KEY,), user_data="#!/bin/sh\necho from user-data > /root/ran\n"
    )
    await write_seed(directory / "seed.iso", instance_id="i-1", hostname="web1", guest=guest)
    async with bare_guest(
        directory,
        "-drive", "file=disk.qcow2,if=virtio,format=qcow2",
        "-drive", "file=seed.iso,if=virtio,format=raw,readonly=on",
        "-device", "virtio-rng-pci", "-device", "VGA",
        *options,
        machine=machine,
        memory=content_of(image).defaults.memory >> 20,
        cpus=2,
    ) as running:  # fmt: skip
        yield running


async def test_direct_boot_is_a_whole_system(debian_image_dir: Path, tmp_path: Path):
    image, content = debian_image_dir, content_of(debian_image_dir)
    options = [
        "-kernel", f"{image}/kernel", "-initrd", f"{image}/initrd",
        "-append", content.kernel_arguments,
    ]  # fmt: skip
    async with debian(image, tmp_path, *options) as guest:
        # The account is there before the prompt is.
        await guest.wait_for(content.ready_line or "", timeout=600)
        assert (await guest.execute("id", "alice"))[0] == 0
        assert (await guest.execute("cloud-init", "status", "--wait"))[0] == 0

        async def says(command: str) -> str:
            return (await guest.execute("sh", "-c", command))[1].strip()

        assert await says("hostname") == "web1"
        assert await says("cat /home/alice/.ssh/authorized_keys") == KEY
        assert await says("sudo -u alice sudo -n id -u") == "0"
        assert await says("passwd --status root | cut -d' ' -f2") == "L"
        assert await says("cat /root/ran") == "from user-data"
        assert await says("systemctl --failed --no-legend") == ""
        assert int(await says("df --output=size -BM / | tail -1 | tr -d M")) > 3500
        assert "10.0.2.15" in await says("ip -4 addr")
        # An individual: made at this boot, not brought along.
        assert len(await says("cat /etc/machine-id")) == 32
        assert await says("find /etc/ssh -name 'ssh_host_*_key' ! -newer /proc/1") == ""
        assert await says("systemctl is-active ssh") == "active"
        # Quiet: nothing that goes out by itself.
        listed = await says("systemctl list-timers --no-legend")
        assert "apt" not in listed
        assert await says("command -v ntpd chronyd; ls /lib/systemd/systemd-timesyncd") in (
            "",
            "ls: cannot access '/lib/systemd/systemd-timesyncd': No such file or directory",
        )
        # The generic kernel knows when it has been cloned (VMGENID).
        assert await says("grep -c CONFIG_VMGENID=y /boot/config-$(uname -r)") == "1"
        guest.tell_agent("guest-shutdown")
        assert await guest.wait_off(timeout=300) == 0


async def test_bios_boot(debian_image_dir: Path, tmp_path: Path):
    async with debian(debian_image_dir, tmp_path) as guest:
        await guest.wait_for("web1 login: ", timeout=800)
        assert (await guest.execute("test", "-d", "/sys/firmware/efi"))[0] == 1


@pytest.mark.skipif(not (OVMF / "OVMF_CODE_4M.secboot.fd").exists(), reason="needs OVMF")
async def test_secure_boot(debian_image_dir: Path, tmp_path: Path):
    shutil.copyfile(OVMF / "OVMF_VARS_4M.ms.fd", tmp_path / "vars.fd")
    options = [
        "-global", "driver=cfi.pflash01,property=secure,value=on",
        "-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.secboot.fd",
        "-drive", "if=pflash,format=raw,file=vars.fd",
    ]  # fmt: skip
    async with debian(debian_image_dir, tmp_path, *options, machine="q35,smm=on") as guest:
        await guest.wait_for("web1 login: ", timeout=800)
        _, log = await guest.execute("sh", "-c", "dmesg | grep -i 'secure boot'")
        assert "enabled" in log


async def test_releases_that_do_not_exist(tmp_path: Path):
    for release in ("3", "sarge", "", "../12", "12 main"):
        with pytest.raises(InvalidError):
            await build_debian(tmp_path, tmp_path, release=release)


async def test_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("undercroft.storage.process._PATH", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingToolError) as caught:
        await build_debian(tmp_path, tmp_path)
    assert "install" in (caught.value.action or "")


async def test_cancelled_build_leaves_no_process_and_no_mount(tmp_path: Path):
    (tmp_path / "out").mkdir()
    reached = asyncio.Event()

    def watch(_: float, phase: str) -> None:
        if phase.startswith("extracting"):
            reached.set()

    task = asyncio.create_task(build_debian(tmp_path / "out", tmp_path, progress=watch))
    waiting = asyncio.create_task(reached.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    assert reached.is_set(), task
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            assert str(tmp_path).encode() not in command
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
