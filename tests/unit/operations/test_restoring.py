"""What a backup says of its VM, and how much of that is believed."""

from __future__ import annotations

from typing import Any

import pytest

from undercroft.model.backup import Backup
from undercroft.model.errors import DataCorruptError
from undercroft.model.vm import Cdrom, DiskBus
from undercroft.operations.restoring import _shape


def backup(**shape: Any) -> Backup:
    return Backup(id="bk-1", vm="vm-1", name="web1", created=1.0, shape={"host": "h", **shape})


def test_a_backup_names_no_files_of_this_host() -> None:
    drives = [{"bus": "sata", "medium": "/root/secret.iso"}, {"bus": "scsi", "unit": 1}]
    assert _shape(backup(cdroms=drives)).cdroms == (Cdrom(), Cdrom(bus=DiskBus.SCSI, unit=1))


def test_what_is_newer_is_passed_over_and_nonsense_refused() -> None:
    assert _shape(backup(cpus=3, warp_drive=True)).cpus == 3
    with pytest.raises(DataCorruptError):
        _shape(backup(cdroms="many"))
