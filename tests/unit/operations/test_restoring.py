"""What a backup says of its VM, and how much of that is believed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.operations.world import World
from undercroft.model.backup import Backup, RestoreRequest
from undercroft.model.errors import DataCorruptError, WrongStateError
from undercroft.model.vm import Cdrom, DiskBus
from undercroft.operations.access import SYSTEM
from undercroft.operations.restoring import _shape, restore


def backup(**shape: Any) -> Backup:
    return Backup(id="bk-1", vm="vm-1", name="web1", created=1.0, shape={"host": "h", **shape})


def test_a_backup_names_no_files_of_this_host() -> None:
    drives = [{"bus": "sata", "medium": "/root/secret.iso"}, {"bus": "scsi", "unit": 1}]
    assert _shape(backup(cdroms=drives)).cdroms == (Cdrom(), Cdrom(bus=DiskBus.SCSI, unit=1))


async def test_going_back_says_what_would_be_lost_and_whether_it_runs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backup()

    async def archived(upload: str) -> Backup:
        return made

    monkeypatch.setattr(world.services, "archived", archived)
    await world.created("off")
    await world.created("on", start=True)
    asked = RestoreRequest(upload="0" * 16, over="off")
    with pytest.raises(WrongStateError, match=r"^vm off would lose what it is now"):
        await restore(world.context, SYSTEM, asked)
    asked = msgspec.structs.replace(asked, over="on")
    with pytest.raises(WrongStateError, match="is running: going back would switch it off"):
        await restore(world.context, SYSTEM, asked)
    for vm, start, off in (("off", False, False), ("on", False, True), ("on", True, False)):
        asked = msgspec.structs.replace(asked, over=vm, force=True, start=start)
        task = await restore(world.context, SYSTEM, asked)
        assert task.spec.arguments["off"] is off
        assert task.spec.arguments["moment"] == made.created
        await world.done(task)


def test_what_is_newer_is_passed_over_and_nonsense_refused() -> None:
    assert _shape(backup(cpus=3, warp_drive=True)).cpus == 3
    with pytest.raises(DataCorruptError):
        _shape(backup(cdroms="many"))
