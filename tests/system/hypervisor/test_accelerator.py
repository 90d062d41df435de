"""The accelerator probe on the host that runs the tests, whatever that is."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from undercroft.hypervisor.accelerator import CACHE_FILE, KVM_DEVICE, Acceleration, probe
from undercroft.hypervisor.accelerator_guest import STAGES
from undercroft.hypervisor.emulator import Emulator, find_emulator

ALL = "".join(STAGES)


@pytest.fixture
async def qemu() -> Emulator:
    return await find_emulator("x86_64")


def check(found: Acceleration) -> None:
    """What must be so on any host."""
    assert found.tcg.available, found.tcg
    assert (found.tcg.code, found.tcg.stages) == ("works", ALL)
    assert found.kvm.available == (found.kvm.code == "works")
    assert found.kvm.available == (found.kvm.stages == ALL), found.kvm
    assert found.kvm.reason
    hardware = any(Path(f"/sys/module/{name}").exists() for name in ("kvm_intel", "kvm_amd"))
    assert hardware or not found.kvm.available, found.kvm
    assert found.best is (found.kvm if found.kvm.available else found.tcg)


async def test_this_host(qemu: Emulator, tmp_path: Path) -> None:
    found = await probe(qemu, tmp_path)
    check(found)
    assert not found.cached
    assert (found.qemu, found.qemu_version) == (qemu.path, qemu.version)
    if not KVM_DEVICE.exists():
        assert found.kvm.code == "no-device"


async def test_the_answer_is_kept(qemu: Emulator, tmp_path: Path) -> None:
    first = await probe(qemu, tmp_path, device=tmp_path / "kvm")
    again = await probe(qemu, tmp_path, device=tmp_path / "kvm")
    assert (first.cached, again.cached) == (False, True)
    assert (again.probed, again.kvm, again.tcg) == (first.probed, first.kvm, first.tcg)
    forced = await probe(qemu, tmp_path, force=True, device=tmp_path / "kvm")
    assert not forced.cached
    assert forced.probed > first.probed


async def test_a_new_device_or_qemu_is_looked_at(qemu: Emulator, tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    missing = await probe(qemu, tmp_path, device=device)
    assert missing.kvm.code == "no-device"
    device.touch()  # opens, and is no KVM at all
    found = await probe(qemu, tmp_path, device=device)
    assert not found.cached
    assert not found.kvm.available
    assert found.kvm.code == "failed"

    link = tmp_path / "qemu-system-x86_64"
    link.write_bytes(b"")
    link.chmod(0o755)
    other = Emulator(arch="x86_64", path=str(link), version=qemu.version)
    broken = await probe(other, tmp_path, device=device)
    assert not broken.cached
    assert not broken.best.available
    assert broken.best.name == "tcg"


@pytest.mark.parametrize("what", ["garbage", "other-boot", "other-guest", "no-answer"])
async def test_a_cache_that_does_not_fit_is_ignored(
    qemu: Emulator, tmp_path: Path, what: str
) -> None:
    device = tmp_path / "kvm"
    await probe(qemu, tmp_path, device=device)
    path = tmp_path / CACHE_FILE
    kept = json.loads(path.read_bytes())
    kept["acceleration"]["tcg"]["reason"] = "from the cache"
    if what == "other-boot":
        kept["conditions"]["boot"] = "another"
    elif what == "other-guest":
        kept["conditions"]["guest"] = "0" * 64
    elif what == "no-answer":
        del kept["acceleration"]["tcg"]
    path.write_text("\0garbage" if what == "garbage" else json.dumps(kept))
    found = await probe(qemu, tmp_path, device=device)
    assert not found.cached
    check(found)
    assert (await probe(qemu, tmp_path, device=device)).cached


async def test_a_doubtful_answer_does_not_last(qemu: Emulator, tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    assert (await probe(qemu, tmp_path, device=device)).kvm.code == "failed"
    assert (await probe(qemu, tmp_path, device=device)).cached
    path = tmp_path / CACHE_FILE
    kept = json.loads(path.read_bytes())
    kept["acceleration"]["probed"] -= 3700
    path.write_text(json.dumps(kept))
    assert not (await probe(qemu, tmp_path, device=device)).cached


async def test_two_probes_at_once(qemu: Emulator, tmp_path: Path) -> None:
    both = await asyncio.gather(*(probe(qemu, tmp_path, device=tmp_path / "kvm") for _ in "12"))
    for found in both:
        check(found)
    assert [path.name for path in tmp_path.iterdir()] == [CACHE_FILE]


async def test_a_cache_that_cannot_be_written(qemu: Emulator, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    found = await probe(qemu, tmp_path / "cache", device=tmp_path / "kvm")
    check(found)


ORDINARY = """
import asyncio, os, sys
from pathlib import Path
import msgspec
from undercroft.hypervisor.accelerator import probe
from undercroft.hypervisor.accelerator_guest import firmware
from undercroft.hypervisor.emulator import find_emulator

async def main():
    emulator = await find_emulator("x86_64")
    return await probe(emulator, Path(sys.argv[1]), device=Path(sys.argv[2]))

asyncio.run(asyncio.to_thread(int))  # what asyncio imports late, while Python's files can be read
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    firmware()
except PermissionError:
    sys.exit("unreadable")
print(msgspec.json.encode(asyncio.run(main())).decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user() -> None:
    """Who may not use the device is told so, and works with TCG all the same."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's are for its own user alone
        directory = Path(name)
        directory.chmod(0o755)
        device = directory / "kvm"
        device.touch()
        device.chmod(0o660)
        os.chown(device, 0, 4242)
        cache = directory / "cache"
        cache.mkdir()
        os.chown(cache, 65534, 65534)
        result = subprocess.run(
            [sys.executable, "-c", ORDINARY, cache, device],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            timeout=60,
        )
        if b"unreadable" in result.stderr:
            pytest.skip("this checkout is closed to other users")
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["tcg"]["available"], found
        assert not found["kvm"]["available"]
        assert found["kvm"]["code"] == "no-permission"
        assert "for the group gid 4242, which nobody is not in" in found["kvm"]["reason"]
        assert (cache / CACHE_FILE).stat().st_uid == 65534
