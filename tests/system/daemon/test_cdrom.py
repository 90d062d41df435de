"""Discs in the drives of a VM, whatever becomes of daemon, machine, VM and files meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.system.daemon.installation import Installation, until, wait_gone
from tests.system.discs import boot_sector, make_bootable, make_disc
from undercroft.model.requests import (
    CloneMode,
    CloneRequest,
    InsertRequest,
    NewCdrom,
    RevertRequest,
    SnapshotCreate,
    StopRequest,
    VMChange,
    VMCreate,
)
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import BootFirst, DiskBus, RestartPolicy

LOOK = """
n=0; while ! [ -b /dev/sr0 ] && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done
mount -r /dev/sr0 /mnt 2>/dev/null && cat /mnt/what && umount /mnt || echo nothing
"""


def failed(installation: Installation, task: Task) -> tuple[str, str]:
    """The code and the words of a task that fails."""
    error = installation.finish(task, TaskState.FAILED).status.error
    assert error is not None
    return error.code, error.detail


def test_discs_stay_where_they_are_put(installation: Installation, place: Path) -> None:
    vms = installation.client.vms
    discs = {n: make_disc(place / f"{n}.iso", n, what=f"{n}\n".encode()) for n in ("one", "two")}
    for disc in discs.values():
        disc.chmod(0o600)  # QEMU, which is somebody else, is handed it

    def holds(name: str) -> str:
        installation.wait_ready(name)
        return installation.shell(name, LOOK)

    def insert(disc: str, vm: str = "web1", *, force: bool = False) -> Task:
        return vms.insert(vm, InsertRequest(path=str(discs[disc]), force=force))

    installation.run(
        "web1", restart=RestartPolicy.ALWAYS, cdroms=(NewCdrom(path=str(discs["one"])),)
    )
    assert holds("web1") == "one"
    # The daemon dies over it: whoever comes next does it.
    task = insert("two")
    installation.kill()
    installation.start()
    installation.finish(task)
    assert holds("web1") == "two"
    # QEMU dies: the next one has what is in the record.
    [pid] = installation.processes()
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    assert holds("web1") == "two"

    # A guest that uses it has it locked.
    installation.shell("web1", "mount -r /dev/sr0 /mnt")
    code, words = failed(installation, vms.eject("web1"))
    assert (code, "locked" in words) == ("in-use", True)
    assert installation.shell("web1", "cat /mnt/what") == "two"
    installation.finish(insert("one", force=True))
    installation.shell("web1", "umount /mnt")
    assert holds("web1") == "one"

    # What is in memory goes with what was in the drive; each clone has its own, of the same file.
    installation.finish(
        installation.client.snapshots.create("web1", SnapshotCreate(name="s1", memory=True))
    )
    installation.finish(insert("two"))
    [task] = vms.clone("web1", CloneRequest(names=("web2",), mode=CloneMode.INSTANT))
    installation.finish(task)
    assert holds("web2") == "two"
    installation.finish(vms.eject("web2"))
    assert holds("web2") == "nothing"
    assert holds("web1") == "two"
    installation.finish(vms.remove("web2", force=True))
    installation.finish(
        installation.client.snapshots.revert("web1", "s1", RevertRequest(force=True))
    )
    assert holds("web1") == "one"
    assert vms.get("web1").spec.cdroms[0].medium == str(discs["one"])

    # Its file is gone: that is said, and how to do without.
    installation.finish(vms.suspend("web1"))
    discs["one"].rename(place / "elsewhere.iso")
    code, words = failed(installation, vms.start("web1"))
    assert (code, str(discs["one"]) in words) == ("not-found", True)
    assert vms.get("web1").status.state == "suspended"
    installation.finish(vms.eject("web1", force=True))
    installation.finish(vms.start("web1"))
    assert holds("web1") == "nothing"
    installation.finish(insert("two"))
    assert holds("web1") == "two"
    installation.finish(vms.stop("web1", StopRequest(force=True)))
    discs["two"].unlink()
    assert failed(installation, vms.start("web1"))[0] == "not-found"
    assert vms.get("web1").status.state in ("stopped", "failed")
    installation.finish(vms.remove_cdrom("web1", 0))
    installation.finish(vms.start("web1"))

    # A drive comes to a guest that runs, too, and goes again.
    make_disc(discs["two"], "two", what=b"two\n")
    task = vms.add_cdrom("web1", NewCdrom(path=str(discs["two"])))
    installation.kill()
    installation.start()
    installation.finish(task)
    until(lambda: holds("web1") == "two", "the guest has seen to its new drive")
    installation.finish(vms.suspend("web1"))
    installation.finish(vms.start("web1"))
    assert holds("web1") == "two"
    installation.finish(vms.remove_cdrom("web1", 0))
    assert installation.shell("web1", "ls /dev | grep -c sr0") == "0"
    sata = vms.add_cdrom("web1", NewCdrom(bus=DiskBus.SATA))
    assert failed(installation, sata)[0] == "unsupported"
    assert vms.get("web1").spec.cdroms == ()
    installation.finish(vms.remove("web1", force=True))
    installation.assert_in_order()


def test_an_installer_boots(installation: Installation, place: Path) -> None:
    """Nothing is said of what is to boot: the disc, until the disk can be. Then it is said."""
    vms = installation.client.vms
    disc = NewCdrom(path=str(make_bootable(place / "setup.iso")))
    request = VMCreate(name="new", disk=64 << 20, memory=128 << 20, ports=(), cdroms=(disc,))

    said: list[bytes] = []

    def boots(says: bytes) -> None:
        installation.finish(vms.start("new"))
        until(lambda: vms.log("new").count(b"\n") > len(said), "it says what booted")
        said.append(says)
        assert vms.log("new").split() == said
        installation.finish(vms.stop("new", StopRequest(force=True)))

    installation.finish(vms.create(request))
    boots(b"BIOS-DISC")
    head = installation.client.volumes.get("new-boot").status.head
    path = installation.data / "volumes" / f"{head}.qcow2"
    (place / "sector").write_bytes(boot_sector("BIOS-DISK"))
    command = f"write -s {place / 'sector'} 0 512"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, path], check=True, capture_output=True)
    boots(b"BIOS-DISK")
    vms.set("new", VMChange(boot=BootFirst.CDROM))
    boots(b"BIOS-DISC")
    installation.finish(vms.remove("new", force=True))
    installation.assert_in_order()
