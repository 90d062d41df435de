"""Volumes that belong to no VM, and how they branch off from those that do."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation
from tests.system.daemon.test_snapshots import read, write
from undercroft.model.errors import InUseError
from undercroft.model.requests import LayerNode, VolumeClone, VolumeCreate
from undercroft.model.task import TaskState
from undercroft.model.units import GiB, MiB

PIECE = 64 << 10


def head(installation: Installation, name: str) -> Path:
    volume = installation.client.volumes.get(name)
    return installation.data / "volumes" / f"{volume.status.head}.qcow2"


def nodes(installation: Installation) -> dict[str, LayerNode]:
    """What each volume writes to."""
    found = installation.client.volumes.tree().nodes
    return {node.volume.name: node for node in found if node.volume is not None}


def io(path: Path, *commands: str) -> str:
    """Reads and writes a volume that stands on its own as a guest would."""
    argv = ["qemu-io", "-f", "qcow2", *(f"-c{command}" for command in commands), str(path)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def test_clones_share_what_never_changes_until_they_are_flattened(
    installation: Installation,
) -> None:
    client = installation.client
    installation.finish(client.volumes.create(VolumeCreate(name="data", size=20 * GiB)))
    io(head(installation, "data"), "write -P 0x11 0 1M")
    for name in ("one", "two"):
        installation.finish(client.volumes.clone("data", VolumeClone(name=name)))
    tops = nodes(installation)
    # Nothing was written between the two, so that both lie on the same layer.
    assert len({tops[name].parent for name in ("data", "one", "two")}) == 1
    assert client.volumes.get("one").status.shared >= MiB
    installation.finish(client.volumes.remove("data"))  # what they lie on stays
    installation.finish(client.volumes.flatten("one"))
    assert nodes(installation)["one"].parent is None
    assert "Pattern verification failed" not in io(head(installation, "one"), "read -P 0x11 0 1M")
    # Now that only one lies on it, it is that one's own.
    assert client.volumes.get("two").status.shared == 0
    assert client.volumes.get("two").status.allocated >= MiB
    larger = VolumeClone(name="large", full=True, size=21 * GiB)
    installation.finish(client.volumes.clone("two", larger))
    text = io(head(installation, "large"), "read -P 0x11 0 1M", f"read -P 0 {20 * GiB} 1M")
    assert "Pattern verification failed" not in text
    report = client.hosts.check_volumes()
    assert not report.findings, report
    for name in ("one", "two", "large"):
        installation.finish(client.volumes.remove(name))
    assert not list((installation.data / "volumes").iterdir())


def test_a_disk_in_use_is_cloned_and_flattened_while_its_guest_goes_on(
    installation: Installation,
) -> None:
    client = installation.client
    installation.run("web1", disk=GiB)
    write(installation, "web1", "before")
    with pytest.raises(InUseError, match="web1"):
        client.volumes.remove("web1-boot")
    installation.finish(client.volumes.clone("web1-boot", VolumeClone(name="copy", full=True)))
    installation.finish(client.volumes.clone("web1-boot", VolumeClone(name="linked")))
    write(installation, "web1", "after")
    installation.finish(client.volumes.flatten("web1-boot"))
    assert nodes(installation)["web1-boot"].parent is None
    write(installation, "web1", "later")
    installation.finish(client.volumes.flatten("linked"))
    for name in ("copy", "linked"):
        raw = installation.data / "tmp" / "shown.raw"
        argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw"]
        subprocess.run([*argv, head(installation, name), raw], check=True)
        with raw.open("rb") as file:
            assert file.read(8).strip() == b"before", name
        raw.unlink()
    assert read(installation, "web1") == "later"
    # A volume that was cloned from a disk of a VM outlives that VM.
    installation.finish(client.vms.remove("web1", force=True))
    assert {volume.meta.name for volume in client.volumes.list()} == {"copy", "linked"}
    report = client.hosts.check_volumes()
    assert not report.findings, report


def test_check_finds_what_is_leaked_gone_and_corrupt(installation: Installation) -> None:
    client = installation.client
    for name in ("good", "leaky", "gone", "corrupt"):
        installation.finish(client.volumes.create(VolumeCreate(name=name, size=GiB)))
        io(head(installation, name), "write -P 0x11 0 1M")
    stray = installation.data / "volumes" / "layer-0000000000000000.qcow2"
    stray.write_bytes(b"left by somebody")
    with head(installation, "leaky").open("r+b") as file:
        blocks = os.fstat(file.fileno()).st_size // PIECE
        file.truncate((blocks + 1) * PIECE)
        file.seek(2 * PIECE + 2 * blocks)
        file.write(b"\x00\x01")  # counted, though nothing refers to it
    with head(installation, "corrupt").open("r+b") as file:
        file.seek(2 * PIECE + 2 * 3)
        file.write(b"\x00\x00")  # referred to, though not counted
    head(installation, "gone").unlink()
    found = {finding.code: finding for finding in client.hosts.check_volumes().findings}
    assert set(found) == {"leaked-file", "leaked-clusters", "missing-layer", "corrupt-layer"}
    assert "volume gone" in found["missing-layer"].message
    assert "volume corrupt" in found["corrupt-layer"].message
    repaired = client.hosts.check_volumes(repair=True)
    assert {f.code for f in repaired.findings if f.repaired} == {"leaked-file", "leaked-clusters"}
    left = {finding.code for finding in client.hosts.check_volumes().findings}
    assert left == {"missing-layer", "corrupt-layer"}
    assert not stray.exists()


def test_clones_survive_the_daemon(installation: Installation) -> None:
    """Killed in the middle of many clones, the next daemon finishes or undoes each."""
    client = installation.client
    installation.finish(client.volumes.create(VolumeCreate(name="data", size=GiB)))
    io(head(installation, "data"), "write -P 0x11 0 1M")
    tasks = []
    killer = threading.Timer(0.05, installation.kill)
    killer.start()
    try:
        for number in range(40):
            request = VolumeClone(name=f"c{number}", full=number % 4 == 0)
            tasks.append(client.volumes.clone("data", request))
    except Exception:
        assert tasks, "none was asked for before it was killed"
    killer.join()
    installation.start()
    for task in tasks:
        installation.finish(task, TaskState.SUCCEEDED)
    for task in installation.client.tasks.list():
        installation.finish(task)  # also those of which nobody heard
    report = installation.client.hosts.check_volumes()
    assert not report.findings, report
    assert not installation.client.hosts.check().findings
    assert all(v.status.state == "ready" for v in installation.client.volumes.list())
