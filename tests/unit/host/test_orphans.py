"""Processes without an owner: found by their mark, and nobody else is ever touched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.host.emulators import Emulators, emulators
from tests.unit.host.rig import Rig
from undercroft.host.orphans import (
    end_machine,
    end_orphans,
    end_processes,
    marked_processes,
    strays,
)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Emulators]:
    with emulators(tmp_path) as made:
        yield made


def test_only_emulators_of_this_data_directory(tmp_path: Path, lab: Emulators) -> None:
    data = tmp_path / "data"
    mine = lab.start(data / "vms" / "vm-a")
    lab.start(tmp_path / "other" / "vms" / "vm-a")
    lab.start(data / "vms" / "vm-a" / "deeper")
    lab.start(None)
    harmless = tmp_path / "harmless"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", harmless)
    lab.start(data / "vms" / "vm-a", program=harmless)
    assert marked_processes(data) == {mine: "vm-a"}
    (tmp_path / "link").symlink_to(data)
    assert marked_processes(tmp_path / "link") == {mine: "vm-a"}


def test_what_made_the_memory_of_a_template(tmp_path: Path, lab: Emulators) -> None:
    left = lab.start(tmp_path / "templates" / "tpl-a" / "work" / "vm")
    assert strays(tmp_path, {"vm-a"}) == {left: "tpl-a"}
    assert end_processes(tmp_path, {left}) == [left]
    assert not lab.lives(left)


def test_those_with_an_owner_live_on(tmp_path: Path, lab: Emulators) -> None:
    data = tmp_path / "data"
    owned = lab.start(data / "vms" / "vm-a")
    stray = lab.start(data / "vms" / "vm-b")
    assert strays(data, {"vm-a"}) == {stray: "vm-b"}
    assert end_processes(data, {stray}) == [stray]
    assert not lab.lives(stray)
    assert lab.lives(owned)
    end_machine(data, "vm-a")
    assert not lab.lives(owned)


def test_a_pid_that_means_somebody_else_is_spared(tmp_path: Path, lab: Emulators) -> None:
    bystander = lab.start(tmp_path / "other" / "vms" / "vm-a")
    assert end_processes(tmp_path / "data", {bystander}) == []
    assert lab.lives(bystander)


def test_one_that_is_gone_counts_as_ended(tmp_path: Path, lab: Emulators) -> None:
    pid = lab.start(tmp_path / "data" / "vms" / "vm-a")
    lab.stop()
    assert marked_processes(tmp_path / "data") == {}
    assert end_processes(tmp_path / "data", {pid}) == [pid]


async def test_at_the_start_of_the_daemon(rig: Rig, lab: Emulators) -> None:
    data = rig.environment.data
    owned, stray = lab.start(data / "vms" / "vm-a"), lab.start(data / "vms" / "vm-b")
    assert await end_orphans(rig.environment, {"vm-a"}) == [stray]
    assert lab.lives(owned)
