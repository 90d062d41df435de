"""VMs go out as files and come back, whatever is killed meanwhile."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation, until
from tests.system.daemon.test_full_disk import fill, small  # noqa: F401 (a fixture)
from tests.system.daemon.test_snapshots import read, write
from tests.system.daemon.test_volumes import head, io
from tests.unit.storage.appliance import packages
from undercroft.model.errors import DaemonError, HostileImageError, NoSpaceError, WrongStateError
from undercroft.model.export import ExportFormat
from undercroft.model.image import DiskFormat
from undercroft.model.requests import DatastoreCreate, NewCdrom, StopRequest, VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.transfer import ExportCreate, ImportCreate, ImportSource
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import DiskBus, Firmware

OFF = StopRequest(force=True)
FORMATS = ("ova", "qcow2", "vhdx")


def croft_says(
    installation: Installation, *words: str, input: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """What becomes of a command."""
    command = [sys.executable, "-m", "undercroft.cli", *words]
    environ = {**os.environ, "CROFT_DATA": str(installation.data)}
    return subprocess.run(command, env=environ, input=input, capture_output=True)


def croft(installation: Installation, *words: str, input: bytes | None = None) -> bytes:
    """What a command prints."""
    done = croft_says(installation, *words, input=input)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def refused(installation: Installation, *words: str) -> str:
    """What a command that must fail tells."""
    done = croft_says(installation, *words)
    assert done.returncode == 1, done
    return done.stderr.decode()


def found(installation: Installation, name: str) -> Path:
    """The file of a volume, in whichever datastore."""
    file = head(installation, name)
    return file if file.exists() else installation.data.with_name("elsewhere") / file.name


def same(installation: Installation, one: str, other: str | Path) -> bool:
    """Whether two disks of VMs that are off hold the same (or a disk, and a raw file)."""
    argv: list[str | Path] = ["qemu-img", "compare", "-f", "qcow2", "-F"]
    argv += ["raw", found(installation, one), other] if isinstance(other, Path) else [
        "qcow2", head(installation, one), head(installation, other)
    ]  # fmt: skip
    return subprocess.run(argv, stdout=subprocess.DEVNULL).returncode == 0


def left_over(installation: Installation) -> list[str]:
    """Files that belong to nothing."""
    places = ("tmp", "exports", "cache/uploads")
    return [str(p) for place in places for p in (installation.data / place).glob("*")]


def test_out_and_in_again(installation: Installation, place: Path) -> None:
    """A guest that runs is exported, imported, and boots with what it had."""
    client = installation.client
    installation.run("web1", disk=256 * MiB, cpus=2, cdroms=(NewCdrom(), NewCdrom()))
    write(installation, "web1", "precious")
    installation.shell("web1", "dd if=/dev/urandom of=/dev/vda bs=1M seek=3 count=3; sync")
    ova = place / "web1.ova"
    croft(installation, "export", "web1", str(ova))
    write(installation, "web1", "later")  # it went on, and its export does not change
    croft(installation, "import", str(ova), "web2", "--start")
    installation.wait_ready("web2")
    assert read(installation, "web2") == "precious"
    vm = client.vms.get("web2")
    assert (vm.spec.cpus, vm.spec.firmware, len(vm.spec.disks)) == (2, Firmware.KERNEL, 1)
    assert vm.spec.ports[0].mac != client.vms.get("web1").spec.ports[0].mac
    assert vm.spec.cdroms == client.vms.get("web1").spec.cdroms
    installation.finish(client.vms.stop("web2", OFF))
    # Its QEMU is killed while it is exported: the export is whole, and so is the guest.
    task = client.exports.create(ExportCreate(vm="web1"))

    def frozen() -> bool:
        status = client.tasks.get(task.meta.id).status
        return status.phase == "compressing the disks" or status.state.final

    until(frozen, "its disks are frozen")
    (pid,) = installation.processes()
    os.kill(pid, signal.SIGKILL)
    export = installation.finish(task).status.result["export"]
    file = client.exports.get(export).status.files[0]
    client.imports.examine(ImportSource(path=file.path))
    client.exports.remove(export)
    installation.wait_ready("web1")
    assert read(installation, "web1") == "later"
    installation.finish(client.vms.stop("web1", OFF))
    # The same through every other door, a pipe among them.
    assert not same(installation, "web1-boot", "web2-boot")
    for format in FORMATS[1:]:
        croft(installation, "export", "web2", str(place / f"d.{format}"))
        croft(installation, "import", str(place / f"d.{format}"), f"x-{format}")
        assert same(installation, f"x-{format}-boot", "web2-boot"), format
    piped = croft(installation, "export", "web2", "-")
    croft(installation, "import", "-", "piped", input=piped)
    assert same(installation, "piped-boot", "web2-boot")
    croft(installation, "export", "web2", str(place / "set.ovf"))
    croft(installation, "import", str(place / "set.ovf"))
    assert same(installation, "web2-2-boot", "web2-boot")
    assert left_over(installation) == []
    installation.assert_in_order()
    assert client.hosts.check_volumes().findings == ()


def send(installation: Installation, key: str, data: bytes) -> None:
    assert installation.client.imports.append(key, 0, data).size == len(data)


def test_packages_of_others(installation: Installation, place: Path) -> None:
    client, key = installation.client, "ab" * 16
    send(installation, key, packages.vmware(place, (8 * MiB, 3 * MiB)))
    found = client.imports.examine(ImportSource(upload=key))
    assert (found.name, len(found.disks)) == ("Web Server 01", 2)
    elsewhere = place / "elsewhere"
    client.datastores.create(DatastoreCreate(name="elsewhere", path=str(elsewhere)))
    request = ImportCreate(upload=key, networks={"*": "restricted"}, datastore="elsewhere")
    task = client.imports.create(request)
    notes = installation.finish(task).status.result["notes"]
    assert any("StorageGroupSection" in note for note in notes)
    vm = client.vms.get("web-server-01")
    assert (vm.spec.firmware, vm.spec.memory, vm.spec.cpus) == (Firmware.UEFI, 2 * GiB, 4)
    assert [disk.bus for disk in vm.spec.disks] == [DiskBus.SATA, DiskBus.SATA]
    assert {port.mode for port in vm.spec.ports} == {"restricted"}
    assert len(list(elsewhere.glob("layer-*"))) == 2
    assert not list((installation.data / "volumes").iterdir())
    (place / "raw").write_bytes(packages.content(3 * MiB, 2))
    assert same(installation, "web-server-01-disk2", place / "raw")
    # What is hostile is refused at once, or by its checksum later; nothing of either stays.
    data = packages.virtualbox(place)
    send(installation, key, data.replace(b'href="deb (1)-disk001', b'href="/etc/passwd  1'))
    with pytest.raises(HostileImageError):
        client.imports.create(ImportCreate(upload=key, name="bad"))
    spoilt = bytearray(data)
    spoilt[len(data) // 2] ^= 1
    send(installation, key, bytes(spoilt))
    task = client.imports.create(ImportCreate(upload=key, name="bad"))
    error = installation.finish(task, TaskState.FAILED).status.error
    assert error is not None
    assert error.code in ("checksum", "image-refused")
    send(installation, key, data)
    wrong = ImportCreate(upload=key, name="bad", sha256="0" * 64)
    error = installation.finish(client.imports.create(wrong), TaskState.FAILED).status.error
    assert error is not None
    assert error.code == "checksum"
    assert [vm.meta.name for vm in client.vms.list()] == ["web-server-01"]
    assert [v.meta.name for v in client.volumes.list() if v.spec.vm != vm.meta.id] == []
    assert left_over(installation) == []
    installation.assert_in_order()


def test_both_ways_survive_the_daemon(installation: Installation, place: Path) -> None:
    """kill -9 while a file is sent, while it is unpacked, and while a VM is exported."""
    client, key = installation.client, "cd" * 16
    installation.finish(client.vms.create(VMCreate(name="web1", disk=256 * MiB)))
    noise = place / "noise"
    noise.write_bytes(os.urandom(96 * MiB))
    io(head(installation, "web1-boot"), f"write -s {noise} 0 96M")
    croft(installation, "export", "web1", str(place / "web1.ova"))
    data = (place / "web1.ova").read_bytes()
    digest = hashlib.sha256(data).hexdigest()

    def halting() -> object:
        yield data[: len(data) // 2]
        installation.kill()
        yield data[len(data) // 2 :]

    with pytest.raises(DaemonError):
        client.imports.append(key, 0, halting())  # type: ignore[arg-type]
    installation.start()
    there = installation.client.imports.upload_status(key).size
    assert 0 < there < len(data)
    with pytest.raises(WrongStateError):
        installation.client.imports.append(key, 0, data)
    installation.client.imports.append(key, there, data[there:])
    request = ImportCreate(upload=key, name="web2", sha256=digest)
    importing = installation.client.imports.create(request)
    exporting = installation.client.exports.create(ExportCreate(vm="web1", format=ExportFormat.VDI))
    for phase in ("unpacking the disk", "writing the disk"):

        def seen(phase: str = phase) -> bool:
            tasks = [installation.client.tasks.get(t.meta.id) for t in (importing, exporting)]
            return any(t.status.phase == phase or t.status.state.final for t in tasks)

        until(seen, phase)
        installation.kill()
        installation.start()
    installation.finish(importing)
    export: Task = installation.finish(exporting)
    assert export.spec.object is not None
    file = installation.client.exports.get(export.spec.object.id).status.files[0]
    with Path(file.path).open("rb") as written:
        assert hashlib.file_digest(written, "sha256").hexdigest() == file.sha256
    installation.client.exports.remove(export.spec.object.id)
    assert same(installation, "web2-boot", "web1-boot")
    until(lambda: not left_over(installation), "nothing is left over")
    installation.assert_in_order()
    assert installation.client.hosts.check_volumes().findings == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_too_small(small: Installation, place: Path) -> None:  # noqa: F811
    client, key = small.client, "ef" * 16
    ova = packages.vmware(place, (8 * MiB,))
    raw = place / "large.raw"
    with raw.open("wb") as file:
        for _ in range(200):
            file.write(os.urandom(MiB))
    source = ImportCreate(path=str(raw), format=DiskFormat.RAW, name="large")
    task = client.imports.create(source)
    error = small.finish(task, TaskState.FAILED).status.error
    assert error is not None
    assert error.code == "no-space"
    with pytest.raises(NoSpaceError, match="free"):
        client.imports.append(key, 0, raw.read_bytes())
    assert left_over(small) == []
    send(small, key, ova)  # and what fits still comes in
    small.finish(client.imports.create(ImportCreate(upload=key, name="fits")))
    assert [vm.meta.name for vm in client.vms.list()] == ["fits"]
    filler = fill(small, 40 * MiB)  # what is kept for the store is not for exports
    task = client.exports.create(ExportCreate(vm="fits"))
    error = small.finish(task, TaskState.FAILED).status.error
    assert error is not None
    assert error.code == "no-space"
    until(lambda: not [f for f in left_over(small) if "filler" not in f], "nothing is left over")
    filler.unlink()
    croft(small, "export", "fits", str(place / "fits.ova"))
    croft(small, "import", str(place / "fits.ova"), "again")
    assert same(small, "again-boot", "fits-boot")
    # Where it is to go there is no room: nothing has its name, and there it goes on later.
    target = place / "target"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "croft", target], check=True)
    try:
        command = ("export", "fits", str(target / "fits.raw"))
        assert "no-space" in refused(small, *command)
        assert not (target / "fits.raw").exists()
        subprocess.run(["mount", "-o", "remount,size=64M", target], check=True)
        small.kill()
        small.start()
        assert "going on" in croft_says(small, *command).stderr.decode()
        assert same(small, "fits-boot", target / "fits.raw")
        assert [file.name for file in target.iterdir()] == ["fits.raw"]
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)
    assert left_over(small) == []
    small.assert_in_order()


def hostile(data: bytes) -> dict[str, bytes]:
    """Files that nobody should be able to harm us with, by their names."""
    return {
        "path.ova": packed("../../etc/evil.ovf"),
        "cut.ova": data[: len(data) // 2],
        "backing.qcow2": qcow2(backing=b"/etc/passwd"),
        "lying.qcow2": qcow2(size=1 << 62),
        "empty.vmdk": b"",
    }


def packed(name: str) -> bytes:
    """An archive with a file of that name."""
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return archive.getvalue()


def qcow2(size: int = MiB, backing: bytes = b"") -> bytes:
    """A header, and little else."""
    at = 112 if backing else 0
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, at, len(backing), 16, size, 0, 1,
                       196608, 65536, 1, 0, 0)  # fmt: skip
    return (head + struct.pack(">QQQII", 0, 0, 0, 4, 104) + bytes(8) + backing).ljust(262144, b"\0")


def test_hostile_files_through_the_command(installation: Installation, place: Path) -> None:
    """A user is told what is wrong, and nothing of it stays; not of a bomb either."""
    bomb = gzip.compress(bytes(64 * MiB)) + gzip.compress(b"more")
    for name, data in {**hostile(packages.virtualbox(place)), "bomb.raw.gz": bomb}.items():
        (place / name).write_bytes(data)
        said = refused(installation, "import", str(place / name), "bad")
        assert "Traceback" not in said, said
        assert "fault of Undercroft" not in said, said
        assert re.search(r"\([a-z-]+\)", said), said
        assert installation.client.vms.list() == []
    assert left_over(installation) == []
    assert installation.client.volumes.list() == []
    installation.assert_in_order()
    assert installation.client.hosts.check_volumes().findings == ()
