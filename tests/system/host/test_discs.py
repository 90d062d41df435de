"""Discs and drives come and go while the daemon is killed at any step: record and machine agree."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.daemon.installation import wait_gone
from tests.system.discs import make_disc
from tests.system.host.incarnation import Incarnation
from undercroft.host import orphans
from undercroft.model.requests import EjectRequest, InsertRequest, NewCdrom, VMCreate
from undercroft.model.vm import MAX_CDROMS, DiskBus, RestartPolicy

MIB = 1 << 20
ROUNDS = 18


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="croft-"))
    path.chmod(0o711)
    yield path
    data = path / "data"
    if data.exists():
        orphans.end_processes(data, set(orphans.marked_processes(data)))
    shutil.rmtree(path)


Ask = tuple[str, tuple[Any, ...], dict[int, str | None]]


def choose(chance: random.Random, drives: dict[int, str | None], discs: list[str]) -> Ask:
    """Something to do, and what is in the drives after that."""
    disc = chance.choice(discs)
    full = [unit for unit, medium in drives.items() if medium is not None]
    verb = chance.choice(["insert", "insert", "eject", "add", "remove"])
    if verb == "eject" and full:
        unit = chance.choice(full)
        return "cdroms.eject", ("vm1", unit, EjectRequest()), {**drives, unit: None}
    if verb == "remove" and len(drives) > 1:
        unit = chance.choice(list(drives))
        left = {known: medium for known, medium in drives.items() if known != unit}
        return "cdroms.remove", ("vm1", unit), left
    if verb == "add" and len(drives) < MAX_CDROMS:
        path = chance.choice([disc, None])
        unit = next(n for n in range(MAX_CDROMS) if n not in drives)
        return "cdroms.add", ("vm1", NewCdrom(path=path)), {**drives, unit: path}
    unit = chance.choice(list(drives))
    return "cdroms.insert", ("vm1", unit, InsertRequest(path=disc)), {**drives, unit: disc}


def test_discs_are_exchanged_or_not(place: Path) -> None:
    chance = random.Random(os.environ.get("CROFT_SEED", "discs"))
    discs = [str(make_disc(place / f"{n}.iso", "X", x=bytes(n * 65536))) for n in (1, 2, 3)]
    sizes: dict[str | None, int] = {disc: Path(disc).stat().st_size for disc in discs}
    sizes[None] = 0
    daemon = Incarnation(place / "data")
    request = VMCreate(
        name="vm1",
        disk=4 * MIB,
        memory=64 * MIB,
        ports=(),
        start=True,
        restart=RestartPolicy.ALWAYS,
        cdroms=(NewCdrom(path=discs[0], bus=DiskBus.SCSI),),
    )
    daemon.ask("do", "vms.create", request)
    before, _, _, _ = daemon.ask("drives", "vm1")
    died = 0
    try:
        for number in range(ROUNDS):
            path, arguments, after = choose(chance, before, discs)
            kills = [chance.randint(1, 260), chance.choice([0, chance.randint(1, 400)])]
            if number % 5 == 4:  # whoever begins anew begins with what the record says
                [pid] = orphans.marked_processes(place / "data")
                os.kill(pid, signal.SIGKILL)
                wait_gone(pid)
            asked = False
            tasks: dict[str, Any] = {}
            while not tasks:
                steps = kills.pop(0) if kills else 0
                try:
                    if not asked:
                        asked = True
                        daemon.ask("do", path, *arguments, steps=steps)
                    found = daemon.ask("peace", steps=steps)
                    daemon.ask("running", "vm1")
                    tasks = found
                except EOFError:
                    died += 1
                    daemon = Incarnation(place / "data")
            assert {state for _, _, state, _, _ in tasks.values()} == {"succeeded"}, tasks
            media, held, nodes, sets = daemon.ask("drives", "vm1")
            assert media in (before, after)
            assert held == {unit: sizes[medium] for unit, medium in media.items()}
            full = [medium for medium in media.values() if medium is not None]
            # One and the same file is handed over once to a machine that begins.
            assert nodes == 2 * len(full)
            assert len(set(full)) < sets <= 1 + len(full)
            before = media
        assert died > 2
        assert daemon.ask("findings") == []
    finally:
        daemon.kill()
