"""Merging of layers beneath a QEMU whose disk is written to from outside, with no guest in it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon.installation import wait_gone
from tests.system.host.incarnation import Incarnation, write_without_daemon
from undercroft.host import orphans
from undercroft.model.requests import CloneRequest, SnapshotCreate, StopRequest, VMCreate
from undercroft.model.vm import RestartPolicy

MIB = 1 << 20
STEPS = [int(steps) for steps in os.environ.get("CROFT_STEPS", "60 90 120 150").split()]
PLACES = [0, 512 << 10, 900 << 10, 2 * MIB, 4 * MIB]


@pytest.fixture
def daemon(data: Path) -> Iterator[Incarnation]:
    incarnation = Incarnation(data)
    yield incarnation
    incarnation.kill()


def create(daemon: Incarnation, name: str = "a") -> None:
    request = VMCreate(
        name=name,
        disk=8 * MIB,
        memory=64 * MIB,
        ports=(),
        start=True,
        restart=RestartPolicy.NEVER,
    )
    daemon.ask("do", "vms.create", request)


def take(daemon: Incarnation, *names: str) -> None:
    for name in names:
        daemon.ask("do", "snapshots.create", "a", SnapshotCreate(name=name))


def kill_emulators(data: Path) -> None:
    for pid in orphans.marked_processes(data):
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)


def test_qemu_killed_right_after_a_merge(daemon: Incarnation, data: Path) -> None:
    """What was merged is in the file, not only in the memory of the QEMU that did it."""
    create(daemon)
    daemon.ask("write", "a", ["write -P 7 0 1M", "write -P 9 2M 4k", "flush"])
    take(daemon, "s1", "s2")
    daemon.ask("write", "a", ["write -P 8 512k 4k", "flush"])
    for name in ("s1", "s2"):  # into a layer that is read only, then into the top
        daemon.ask("do", "snapshots.remove", "a", name)
    kill_emulators(data)
    daemon.ask("stopped", "a")
    assert daemon.ask("depth", "a") == 1
    assert daemon.ask("read", "head", "a", PLACES, 4096) == [7, 8, 7, 9, 0]
    assert daemon.ask("findings") == []


def test_layers_of_a_vm_that_is_off(daemon: Incarnation) -> None:
    create(daemon)
    daemon.ask("write", "a", ["write -P 7 0 1M", "flush"])
    take(daemon, "s1", "s2")
    daemon.ask("write", "a", ["write -P 8 512k 4k", "flush"])
    daemon.ask("do", "vms.stop", "a", StopRequest(force=True))
    for name in ("s1", "s2"):
        daemon.ask("do", "snapshots.remove", "a", name)
    assert daemon.ask("depth", "a") == 1
    assert daemon.ask("read", "head", "a", PLACES, 4096) == [7, 8, 7, 0, 0]
    assert daemon.ask("findings") == []


def test_clones_share_a_layer_that_was_merged_into(daemon: Incarnation) -> None:
    """The source's QEMU keeps no lock on what it wrote to in order to merge."""
    create(daemon)
    daemon.ask("write", "a", ["write -P 7 0 1M", "flush"])
    take(daemon, "s1", "s2")
    daemon.ask("do", "vms.restart", "a", StopRequest(force=True))  # now it only reads what is below
    daemon.ask("do", "snapshots.remove", "a", "s1")
    daemon.ask("do", "vms.clone", "a", CloneRequest(names=("b",), start=True))
    assert daemon.ask("states") == {"a": "running", "b": "running"}
    daemon.ask("write", "b", ["write -P 8 0 4k", "flush"])
    assert daemon.ask("read", "head", "b", PLACES, 4096) == [8, 7, 7, 0, 0]
    assert daemon.ask("read", "head", "a", PLACES, 4096) == [7, 7, 7, 0, 0]
    daemon.ask("do", "vms.stop", "a", StopRequest(force=True))
    assert daemon.ask("findings") == []


def test_what_costs_less_is_copied(daemon: Incarnation) -> None:
    create(daemon)
    lower = daemon.ask("head", "a")
    daemon.ask("write", "a", ["write -P 7 0 1M", "flush"])
    take(daemon, "s1")
    daemon.ask("write", "a", ["write -P 8 512k 4k", "flush"])
    daemon.ask("do", "snapshots.remove", "a", "s1")
    assert daemon.ask("head", "a") == lower
    take(daemon, "s2")
    daemon.ask("write", "a", ["write -P 9 2M 3M", "flush"])
    daemon.ask("do", "snapshots.remove", "a", "s2")
    assert daemon.ask("head", "a") != lower
    take(daemon, "s3")
    assert daemon.ask("depth", "a") == 2
    assert daemon.ask("read", "head", "a", PLACES, 4096) == [7, 8, 7, 9, 9]
    assert daemon.ask("findings") == []


def test_a_long_chain(daemon: Incarnation) -> None:
    """QEMU is understood when it tells of many layers, and puts them together again."""
    create(daemon)
    count = 36
    for number in range(count):
        daemon.ask("write", "a", [f"write -P {number + 1} {number * 128}k 4k", "flush"])
        take(daemon, f"s{number}")
    for number in (30, 2, count - 1):
        daemon.ask("do", "snapshots.remove", "a", f"s{number}")
    assert daemon.ask("depth", "a") == count + 1 - 3
    places = [number * 128 << 10 for number in range(count)]
    assert daemon.ask("read", "head", "a", places, 4096) == list(range(1, count + 1))


@pytest.mark.parametrize("steps", STEPS)
def test_a_daemon_dies_over_a_merge_and_then_qemu_does(data: Path, steps: int) -> None:
    """What the guest wrote and flushed while there was no daemon is there after all that."""
    daemon = Incarnation(data)
    create(daemon)
    vm = daemon.ask("ids")["a"]
    daemon.ask("write", "a", ["write -P 7 0 1M", "flush"])
    take(daemon, "s1")
    daemon.ask("write", "a", ["write -P 8 512k 4k", "flush"])
    holds = [7, 8, 7, 0, 0]
    try:
        daemon.ask("do", "snapshots.remove", "a", "s1", steps=steps)
    except EOFError:
        if asyncio.run(write_without_daemon(data, vm, lambda: ["write -P 9 2M 4k", "flush"])):
            holds[3] = 9
        daemon = Incarnation(data)
    # And the next one dies, too, when it has got further; then QEMU.
    try:
        daemon.ask("peace", steps=steps)
    except EOFError:
        if asyncio.run(write_without_daemon(data, vm, lambda: ["write -P 5 4M 4k", "flush"])):
            holds[4] = 5
        kill_emulators(data)
        daemon = Incarnation(data)
    daemon.ask("peace")
    assert daemon.ask("depth", "a") == 1
    assert daemon.ask("read", "head", "a", PLACES, 4096) == holds
    assert daemon.ask("findings") == []
    daemon.kill()
