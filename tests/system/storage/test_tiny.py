"""`tiny` really boots, and everything that it promises works."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.system.bare_guest import BareGuest, bare_guest
from tests.system.built_images import content_of
from undercroft.hypervisor.hosttsc import measure_tsc_khz
from undercroft.model.errors import FetchError
from undercroft.storage.build.tiny import READY_LINE, build_tiny


def direct_boot(image: Path, extra: str = "") -> list[str]:
    arguments = f"{content_of(image).kernel_arguments} {extra}"
    return [
        "-kernel", f"{image}/kernel", "-initrd", f"{image}/initrd", "-append", arguments
    ]  # fmt: skip


@pytest.fixture
async def guest(tiny_image_dir: Path, tmp_path: Path) -> AsyncIterator[BareGuest]:
    options = direct_boot(tiny_image_dir, "undercroft.hostname=small-one")
    async with bare_guest(tmp_path, *options, "-device", "VGA", "-device", "pvpanic-pci") as guest:
        await guest.wait_for(READY_LINE)
        yield guest


async def test_agent_network_and_shutdown(guest: BareGuest):
    assert await guest.execute("uname", "-n") == (0, "small-one\n")
    assert await guest.execute("sh", "-c", "exit 3") == (3, "")
    info = await guest.agent("guest-get-osinfo")
    assert info["id"] == "undercroft-tiny"
    async with asyncio.timeout(60):
        while "10.0.2.15/24" not in (await guest.execute("ip", "-4", "addr", "show", "eth0"))[1]:
            await asyncio.sleep(0.1)
    # Quiet: apart from the DHCP exchange nothing leaves, and IPv6 is off.
    assert (await guest.execute("cat", "/proc/net/if_inet6"))[1] == ""
    handle = await guest.agent("guest-file-open", path="/root/f", mode="w")
    await guest.agent("guest-file-write", handle=handle, **{"buf-b64": "aGVsbG8="})
    await guest.agent("guest-file-close", handle=handle)
    assert await guest.execute("cat", "/root/f") == (0, "hello")
    guest.tell_agent("guest-shutdown")
    assert await guest.wait_off() == 0


async def test_console_shell_comes_back(guest: BareGuest):
    await guest.wait_for("root@small-one")
    guest.type("echo $((6 * 7)) fish\n")
    await guest.wait_for("42 fish")
    guest.type("exit\n")
    await guest.wait_for("BusyBox")
    await guest.wait_for("root@small-one")
    # Job control: an interrupt reaches the program, which is in the foreground when it speaks.
    guest.type("sh -c 'echo begin; exec sleep 1000'\n")
    await guest.wait_for("begin\r\n")
    guest.type("\x03")
    await guest.wait_for("root@small-one")
    guest.type("echo still $((40 + 2))\n")
    await guest.wait_for("still 42")


async def test_power_button(guest: BareGuest):
    await guest.agent("guest-ping")
    async with asyncio.timeout(60):
        while (await guest.execute("pidof", "acpid"))[0] != 0:
            await asyncio.sleep(0.1)
    await guest.monitor("system_powerdown")
    assert await guest.wait_off() == 0


async def test_panic_is_reported_to_the_host(guest: BareGuest):
    while "pvpanic_pci" not in (await guest.execute("lsmod"))[1]:
        await asyncio.sleep(0.1)
    guest.type("echo c > /proc/sysrq-trigger\n")
    await guest.wait_for("Kernel panic")
    # pvpanic's default: QEMU ends with the guest (-no-reboot) after GUEST_PANICKED.
    assert await guest.wait_off() == 0


async def test_microvm(tiny_image_dir: Path, tmp_path: Path):
    # A microvm has nothing to measure its clock by when the host is busy: it is told.
    khz = await asyncio.to_thread(measure_tsc_khz)
    options = direct_boot(tiny_image_dir, f"tsc_early_khz={khz}" if khz else "")
    async with bare_guest(tmp_path, *options, machine="microvm,pic=off") as guest:
        await guest.wait_for(READY_LINE)
        assert await guest.execute("uname", "-n") == (0, "tiny\n")


async def test_small_memory(tiny_image_dir: Path, tmp_path: Path):
    megabytes = content_of(tiny_image_dir).defaults.memory >> 20
    async with bare_guest(tmp_path, *direct_boot(tiny_image_dir), memory=megabytes) as guest:
        await guest.wait_for(READY_LINE)
        assert await guest.execute("echo", "enough") == (0, "enough\n")


async def test_mirror_that_is_not_there(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FetchError) as caught:
        await build_tiny(tmp_path / "out", tmp_path, mirror="http://127.0.0.1:1/debian")
    assert "--mirror" in (caught.value.action or "")


async def test_archive_that_debian_did_not_sign(tmp_path: Path):
    release = tmp_path / "mirror/dists/bookworm"
    release.mkdir(parents=True)
    (release / "InRelease").write_text("Origin: Debian\nSuite: bookworm\nSHA256:\n")
    (release / "Release").write_text("Origin: Debian\nSuite: bookworm\nSHA256:\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(FetchError):
        await build_tiny(tmp_path / "out", tmp_path, mirror=f"{tmp_path}/mirror")


async def test_cancelled_build_leaves_no_process(tmp_path: Path):
    (tmp_path / "out").mkdir()
    phases: list[str] = []
    task = asyncio.create_task(
        build_tiny(tmp_path / "out", tmp_path, progress=lambda f, phase: phases.append(phase))
    )
    while "downloading packages" not in phases:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
                environment = (process / "environ").read_bytes()
            except OSError:
                continue
            assert str(tmp_path).encode() not in environment + command
