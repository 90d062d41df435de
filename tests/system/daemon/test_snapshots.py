"""Snapshots of real guests: what comes back, and what a crash in the middle leaves."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation, until, wait_gone
from undercroft.client.client import Client
from undercroft.model.backup import BackupCreate
from undercroft.model.errors import GuestAgentError, UndercroftError, WrongStateError
from undercroft.model.requests import (
    CloneMode,
    CloneRequest,
    RevertRequest,
    SnapshotCreate,
    StopRequest,
    VMChange,
)
from undercroft.model.task import Task, TaskState
from undercroft.model.transfer import ExportCreate

FORCE = RevertRequest(force=True)
START = RevertRequest(force=True, start=True)
# Writes its number into one block after the other, each durably before the next.
WRITER = """i=0; rm -f /tmp/stop; while [ ! -e /tmp/stop ]; do
printf '%08d' $i | dd of=/dev/vda bs=512 seek=$i conv=notrunc,fsync 2>/dev/null; i=$((i+1)); done"""
WIPER = "touch /tmp/stop; sleep 0.5; dd if=/dev/zero of=/dev/vda bs=1M count=4 conv=fsync"


def written(installation: Installation, name: str) -> int:
    """How many blocks hold their number, without a gap."""
    text = installation.shell(name, "dd if=/dev/vda bs=512 count=8000 2>/dev/null | tr -d '\\000'")
    numbers = [int(text[at : at + 8]) for at in range(0, len(text), 8)]
    assert numbers == list(range(len(numbers)))
    return len(numbers)


def write(installation: Installation, name: str, text: str) -> None:
    installation.shell(name, f"printf %-8s '{text}' | dd of=/dev/vda conv=notrunc,fsync")


def read(installation: Installation, name: str) -> str:
    return installation.shell(
        name, "dd if=/dev/vda bs=8 count=1 iflag=direct 2>/dev/null || head -c8 /dev/vda"
    )


def over(installation: Installation, task: Task) -> bool:
    return installation.client.tasks.get(task.meta.id).status.state.final


def take(
    installation: Installation,
    name: str,
    snapshot: str,
    *,
    memory: bool = False,
    quiesce: bool = False,
) -> None:
    request = SnapshotCreate(name=snapshot, memory=memory, quiesce=quiesce)
    installation.finish(installation.client.snapshots.create(name, request))


def test_disks_and_memory_go_back_and_branch(installation: Installation) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    write(installation, "web1", "one")
    take(installation, "web1", "one")
    write(installation, "web1", "two")
    installation.shell("web1", "echo kept > /tmp/memory")
    take(installation, "web1", "two", memory=True)
    installation.shell("web1", "rm /tmp/memory")
    write(installation, "web1", "three")

    with pytest.raises(WrongStateError, match="switch it off"):
        client.snapshots.revert("web1", "two")
    installation.finish(client.snapshots.revert("web1", "two", FORCE))
    assert installation.shell("web1", "cat /tmp/memory") == "kept"
    assert read(installation, "web1") == "two"
    assert client.vms.get("web1").status.state == "running"

    client.vms.set("web1", VMChange(cpus=2))
    installation.finish(client.snapshots.revert("web1", "one", START))
    installation.wait_ready("web1")
    assert read(installation, "web1") == "one"
    assert client.vms.get("web1").spec.cpus == 1
    write(installation, "web1", "other")
    take(installation, "web1", "other")

    one, two, other = client.snapshots.list("web1")
    assert (two.status.parent, other.status.parent) == (one.meta.id, one.meta.id)
    assert client.vms.get("web1").status.snapshot == other.meta.id
    installation.finish(client.snapshots.remove("web1", "one"))
    assert [s.status.parent for s in client.snapshots.list("web1")] == [None, None]
    assert read(installation, "web1") == "other"
    installation.finish(client.snapshots.revert("web1", "two", FORCE))
    assert installation.shell("web1", "cat /tmp/memory") == "kept"
    assert read(installation, "web1") == "two"
    installation.assert_in_order()
    installation.finish(client.vms.remove("web1", force=True))
    assert list((installation.data / "volumes").iterdir()) == []
    installation.assert_in_order()


def layers(installation: Installation) -> int:
    return len(list((installation.data / "volumes").iterdir()))


@pytest.mark.parametrize("state", ["running", "restarted", "stopped"])
def test_what_only_the_next_layer_needs_is_merged(installation: Installation, state: str) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    for number in range(1, 4):
        place = f"dd of=/dev/vda bs=1M seek={number} conv=notrunc,fsync"
        installation.shell("web1", f"printf %-8s 'is{number}' | {place}")
        write(installation, "web1", f"at{number}")
        take(installation, "web1", f"s{number}")
    write(installation, "web1", "now")
    if state != "running":
        installation.finish(client.vms.stop("web1", StopRequest(force=True)))
    if state == "restarted":  # now QEMU has all but the top for reading only
        installation.finish(client.vms.start("web1"))
        installation.wait_ready("web1")
    assert layers(installation) == 4
    for left, name in enumerate(("s2", "s1", "s3")):
        installation.finish(client.snapshots.remove("web1", name))
        assert layers(installation) == 3 - left
    installation.assert_in_order()
    if state == "stopped":
        installation.finish(client.vms.start("web1"))
        installation.wait_ready("web1")
    for _ in range(2):
        assert read(installation, "web1") == "now"
        for number in range(1, 4):
            text = f"dd if=/dev/vda bs=1M skip={number} count=1 2>/dev/null | head -c8"
            assert installation.shell("web1", text) == f"is{number}"
        take(installation, "web1", "again")  # the chain can go on
        installation.finish(client.snapshots.revert("web1", "again", START))
        installation.finish(client.snapshots.remove("web1", "again"))
        installation.wait_ready("web1")


@pytest.mark.parametrize("delay", [0.02, 0.06, 0.15])
def test_killed_while_merging(installation: Installation, delay: float) -> None:
    installation.run("web1", disk=1 << 30)
    installation.shell("web1", "dd if=/dev/urandom of=/tmp/a bs=1M count=24 2>/dev/null")
    installation.shell("web1", "dd if=/tmp/a of=/dev/vda conv=notrunc,fsync 2>/dev/null")
    take(installation, "web1", "one")
    task = installation.client.snapshots.remove("web1", "one")
    time.sleep(delay)
    installation.kill()
    installation.start()
    installation.finish(task)
    assert layers(installation) == 1
    installation.assert_in_order()
    assert installation.shell("web1", "cmp -n 25165824 /tmp/a /dev/vda && echo same") == "same"
    write(installation, "web1", "on")
    assert read(installation, "web1") == "on"


def test_a_suspended_vm_keeps_its_memory(installation: Installation) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    installation.shell("web1", "echo kept > /tmp/memory")
    installation.finish(client.vms.suspend("web1"))
    take(installation, "web1", "asleep")
    assert client.snapshots.get("web1", "asleep").status.memory > 0
    installation.finish(client.vms.start("web1"))
    installation.shell("web1", "rm /tmp/memory")
    for _ in range(2):  # it can be used more than once
        installation.finish(client.snapshots.revert("web1", "asleep", START))
        assert installation.shell("web1", "cat /tmp/memory; rm /tmp/memory") == "kept"
    installation.assert_in_order()


def test_a_guest_that_cannot_be_quiesced_is_told_so(installation: Installation) -> None:
    installation.run("web1", disk=1 << 30)
    take(installation, "web1", "quiet", quiesce=True)
    assert installation.client.snapshots.get("web1", "quiet").status.quiesced
    installation.finish(installation.client.vms.pause("web1"))
    task = installation.client.snapshots.create("web1", SnapshotCreate(quiesce=True))
    failed = installation.finish(task, TaskState.FAILED)
    assert failed.status.error is not None
    assert failed.status.error.code == GuestAgentError.code
    assert [s.meta.name for s in installation.client.snapshots.list("web1")] == ["quiet"]
    assert len(list((installation.data / "volumes").iterdir())) == 2
    installation.finish(installation.client.vms.resume("web1"))
    write(installation, "web1", "on")
    assert read(installation, "web1") == "on"
    installation.assert_in_order()


@pytest.mark.parametrize("victim", ["daemon", "qemu", "both"])
def test_killed_while_a_guest_writes_and_is_kept(installation: Installation, victim: str) -> None:
    """Whatever is killed, and when: no block that the guest had flushed is missing, neither from
    the VM nor from the snapshot, if that came to be."""
    random.seed(victim)
    installation.run("web1", disk=1 << 30)
    for memory in (False, True):
        installation.in_background("web1", WRITER)
        flushed = until(lambda: written(installation, "web1"), "something is written")
        task = installation.client.snapshots.create("web1", SnapshotCreate(memory=memory))
        time.sleep(random.uniform(0.0, 0.12))
        (pid,) = installation.processes()
        if victim in ("daemon", "both"):
            installation.kill()
        if victim in ("qemu", "both"):
            os.kill(pid, signal.SIGKILL)
            wait_gone(pid)
        if victim in ("daemon", "both"):
            installation.start()
        client = installation.client

        until(partial(over, installation, task), "the snapshot is taken, or not")
        installation.wait_state("web1", "running")
        installation.wait_ready("web1")
        assert written(installation, "web1") >= flushed
        installation.assert_in_order()
        taken = client.snapshots.list("web1")
        if client.tasks.get(task.meta.id).status.state is TaskState.SUCCEEDED:
            installation.finish(client.snapshots.revert("web1", taken[-1].meta.name, START))
            installation.wait_ready("web1")
            assert written(installation, "web1") >= flushed
        else:
            assert victim != "daemon", "the next daemon finishes what was begun"
        installation.shell("web1", WIPER)


def test_the_daemon_dies_over_anything_while_a_guest_writes(
    installation: Installation, place: Path
) -> None:
    """It is done all the same, and no block is missing of what the guest had flushed, neither from
    its disk nor from what goes on from there."""
    random.seed(1)
    request = BackupCreate(repository=str(place / "backups"))
    verbs: dict[str, Callable[[Client], Task]] = {
        "snapshot": lambda c: c.snapshots.create("web1", SnapshotCreate(name="s1")),
        "memory": lambda c: c.snapshots.create("web1", SnapshotCreate(name="s2", memory=True)),
        "merge": lambda c: c.snapshots.remove("web1", "s1"),
        "full": lambda c: c.vms.clone("web1", CloneRequest(names=("a",), mode=CloneMode.FULL))[0],
        "instant": lambda c: c.vms.clone(
            "web1", CloneRequest(names=("b",), mode=CloneMode.INSTANT)
        )[0],
        "export": lambda c: c.exports.create(ExportCreate(vm="web1")),
        "backup": lambda c: c.backups.create("web1", request),
        "fold": lambda c: c.snapshots.remove("web1", "s2"),
    }
    installation.run("web1", disk=1 << 30)
    installation.in_background("web1", WRITER)
    for verb, begin in verbs.items():
        flushed = until(lambda: written(installation, "web1"), "something is written")
        task = begin(installation.client)
        time.sleep(random.uniform(0.0, 0.15))
        installation.kill()
        installation.start()
        installation.finish(task)
        assert written(installation, "web1") >= flushed, verb
        if verb == "instant":
            installation.wait_ready("b")
            assert written(installation, "b") >= flushed
            installation.finish(installation.client.vms.remove("b", force=True))
    installation.assert_in_order()
    assert installation.client.hosts.check_volumes().findings == ()


@pytest.mark.parametrize("delay", [0.01, 0.08])
def test_killed_while_going_back(installation: Installation, delay: float) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    write(installation, "web1", "kept")
    take(installation, "web1", "kept", memory=True)
    write(installation, "web1", "lost")
    task = client.snapshots.revert("web1", "kept", FORCE)
    time.sleep(delay)
    installation.kill()
    installation.start()
    installation.finish(task)
    installation.wait_ready("web1")
    assert read(installation, "web1") == "kept"
    assert len(installation.processes()) == 1
    installation.assert_in_order()


def test_what_is_not_there_is_said(installation: Installation) -> None:
    installation.run("web1", ready=False)
    take(installation, "web1", "one")
    with pytest.raises(UndercroftError, match="has a snapshot one already"):
        installation.client.snapshots.create("web1", SnapshotCreate(name="one"))
    with pytest.raises(UndercroftError, match="has no snapshot two"):
        installation.client.snapshots.revert("web1", "two", FORCE)
