"""Discs are exchanged while the daemon is killed at any step: record and machine agree."""

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
from undercroft.model.vm import RestartPolicy

MIB = 1 << 20
ROUNDS = 14


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="croft-"))
    path.chmod(0o711)
    yield path
    data = path / "data"
    if data.exists():
        orphans.end_processes(data, set(orphans.marked_processes(data)))
    shutil.rmtree(path)


def test_discs_are_exchanged_or_not(place: Path) -> None:
    chance = random.Random(os.environ.get("CROFT_SEED", "discs"))
    discs = [make_disc(place / f"{n}.iso", "X", x=bytes(n * 65536)) for n in (1, 2, 3)]
    sizes = {str(disc): disc.stat().st_size for disc in discs}
    daemon = Incarnation(place / "data")
    request = VMCreate(
        name="vm1",
        disk=4 * MIB,
        memory=64 * MIB,
        ports=(),
        start=True,
        restart=RestartPolicy.ALWAYS,
        cdroms=(NewCdrom(path=str(discs[0])),),
    )
    daemon.ask("do", "vms.create", request)
    before, _, _ = daemon.ask("disc", "vm1")
    died = 0
    try:
        for number in range(ROUNDS):
            wanted = chance.choice([*map(str, discs), None])
            if before is None and wanted is None:
                wanted = str(discs[1])
            kills = [chance.randint(1, 260), chance.choice([0, chance.randint(1, 400)])]
            if number % 5 == 4:  # whoever begins anew begins with what the record says
                [pid] = orphans.marked_processes(place / "data")
                os.kill(pid, signal.SIGKILL)
                wait_gone(pid)
            path = "cdroms.eject" if wanted is None else "cdroms.insert"
            how = EjectRequest() if wanted is None else InsertRequest(path=wanted)
            asked = False
            tasks: dict[str, Any] = {}
            while not tasks:
                steps = kills.pop(0) if kills else 0
                try:
                    if not asked:
                        asked = True
                        daemon.ask("do", path, "vm1", 0, how, steps=steps)
                    found = daemon.ask("peace", steps=steps)
                    daemon.ask("running", "vm1")
                    tasks = found
                except EOFError:
                    died += 1
                    daemon = Incarnation(place / "data")
            assert {state for _, _, state, _, _ in tasks.values()} == {"succeeded"}, tasks
            medium, size, opened = daemon.ask("disc", "vm1")
            assert medium in (before, wanted)
            assert size == sizes.get(medium, 0)
            assert len(opened) == (3 if medium else 1), opened
            assert opened[-1] == ("2 sets" if medium else "1 sets")
            before = medium
        assert died > 2
        assert daemon.ask("findings") == []
    finally:
        daemon.kill()
