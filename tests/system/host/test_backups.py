"""Backups, snapshots, reverts, switches and writes in any order, with the daemon or QEMU killed or
the disk full at any step: every backup that is there holds what the disks held, byte for byte,
however little of them was read for it.

There are no guests: what one would write, `qemu-io` does, through the VM's own QEMU where it runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.system.daemon.installation import wait_gone
from tests.system.host.fuse import NONE, Trouble, Victim, remove_disk, small_disk, troubles
from tests.system.host.incarnation import Incarnation
from undercroft.host import orphans
from undercroft.model.backup import Backup, BackupCreate, BackupKind, RestoreRequest
from undercroft.model.checkpoint import CheckpointCreate
from undercroft.model.errors import UndercroftError
from undercroft.model.requests import (
    RevertRequest,
    SnapshotCreate,
    StopRequest,
    VMCreate,
    VolumeResize,
)
from undercroft.model.vm import RestartPolicy
from undercroft.storage.backup.reading import read_disk, verify
from undercroft.storage.backup.repository import Repository
from undercroft.storage.threads import Stop

MIB = 1 << 20
SIZE = 66 * MIB + 4096  # more than one map covers, and a last chunk that is short
LENGTH = 4096
PLACES = [0, 61440, 65536, 3 * MIB, 63 * MIB, 64 * MIB, SIZE - 4096]
FORCE = StopRequest(force=True)
PICK = st.integers(0, 5)
WRITES = st.lists(st.integers(0, len(PLACES) - 1), min_size=1, max_size=3)
TROUBLE = troubles(st.just(0), st.integers(1, 300), st.integers(1, 1500))
ROOM = 256 * MIB  # of the disk that the repository is on, too


class Backups(RuleBasedStateMachine):
    """One VM, one repository, one daemon after another."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="croft-"))
        self.place.chmod(0o711)
        self.disk = small_disk(self.place, ROOM)
        self.data = self.disk / "data"
        self.repository = self.disk / "backups"
        self.daemon = Incarnation(self.data)
        self.now = [0] * len(PLACES)
        self.snapshots: dict[str, list[int]] = {}
        self.expected: dict[str, list[int]] = {}  # by the id of the backup
        self.value = self.number = 0
        self.size = SIZE
        self.failed = False

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.change([1, 5], True, NONE)
                self.everything_is_as_it_should_be()
        finally:
            self.daemon.kill()
            if self.data.exists():
                orphans.end_processes(self.data, set(orphans.marked_processes(self.data)))
            remove_disk(self.disk)
            shutil.rmtree(self.place)

    @initialize()
    def begin(self) -> None:
        request = VMCreate(
            name="a", disk=SIZE, memory=64 * MIB, ports=(), start=True, restart=RestartPolicy.NEVER
        )
        self.ask("vms.create", request)
        self.write([0, 2, 4])
        self.back_up(False, NONE)

    @rule(writes=WRITES, backup=st.sampled_from([True, True, False]), trouble=TROUBLE)
    def change(self, writes: list[int], backup: bool, trouble: Trouble) -> None:
        self.write(writes)
        if backup:
            self.back_up(False, trouble)

    def write(self, writes: list[int]) -> None:
        commands = []
        for place in writes:
            self.value = self.value % 255 + 1
            self.now[place] = self.value
            commands.append(f"write -P {self.value} {PLACES[place]} {LENGTH}")
        self.daemon.ask("write", "a", [*commands, "flush"])

    @rule(place=st.integers(0, len(PLACES) - 1))
    def discard(self, place: int) -> None:
        self.now[place] = 0
        self.daemon.ask("write", "a", [f"write -z -u {PLACES[place]} {LENGTH}", "flush"])

    @rule(full=st.sampled_from([False, False, False, True]), trouble=TROUBLE)
    def back_up(self, full: bool, trouble: Trouble) -> None:
        self.ask(
            "backups.create",
            "a",
            BackupCreate(repository=str(self.repository), full=full),
            trouble=trouble,
        )

    @rule(trouble=TROUBLE)
    def checkpoint_of_others(self, trouble: Trouble) -> None:
        self.ask("checkpoints.create", "a", CheckpointCreate(owner="others"), trouble=trouble)

    @rule(verb=st.sampled_from(["start", "stop", "restart", "suspend"]), trouble=TROUBLE)
    def switch(self, verb: str, trouble: Trouble) -> None:
        arguments = (FORCE,) if verb in ("stop", "restart") else ()
        self.ask(f"vms.{verb}", "a", *arguments, trouble=trouble)

    @rule(trouble=TROUBLE)
    def take(self, trouble: Trouble) -> None:
        self.number += 1
        name = f"s{self.number}"
        held = list(self.now)
        if self.ask("snapshots.create", "a", SnapshotCreate(name=name), trouble=trouble):
            self.snapshots[name] = held

    @rule(snapshot=PICK, start=st.booleans(), trouble=TROUBLE)
    def revert(self, snapshot: int, start: bool, trouble: Trouble) -> None:
        for name in sorted(self.snapshots)[snapshot : snapshot + 1]:
            request = RevertRequest(force=True, start=start)
            done = self.ask("snapshots.revert", "a", name, request, trouble=trouble)
            self.gone_back(done, self.snapshots[name])

    @rule(snapshot=PICK, trouble=TROUBLE)
    def forget(self, snapshot: int, trouble: Trouble) -> None:
        for name in sorted(self.snapshots)[snapshot : snapshot + 1]:
            done = self.ask("snapshots.remove", "a", name, trouble=trouble)
            if done or ("a", name) not in self.daemon.ask("frozen")[0]:
                del self.snapshots[name]

    @rule(backup=PICK, trouble=TROUBLE)
    def restore_over(self, backup: int, trouble: Trouble) -> None:
        for id in sorted(self.expected)[backup : backup + 1]:
            request = RestoreRequest(
                repository=str(self.repository), backup=id, over="a", force=True, start=True
            )
            done = self.ask("backups.restore", request, trouble=trouble)
            self.gone_back(done, self.expected[id])

    @rule(backup=PICK, trouble=TROUBLE)
    def remove(self, backup: int, trouble: Trouble) -> None:
        for id in sorted(self.expected)[backup : backup + 1]:
            done = self.ask("backups.remove", str(self.repository), [id], trouble=trouble)
            if done or id not in self.backups():
                del self.expected[id]

    @rule(trouble=TROUBLE)
    def grow(self, trouble: Trouble) -> None:
        if self.size < SIZE + 3 * 65536:
            self.size += 65536
            request = VolumeResize(size=self.size)
            self.ask("volumes.resize", "a-boot", request, trouble=trouble)

    @rule()
    def qemu_dies(self) -> None:
        for pid in orphans.marked_processes(self.data):
            os.kill(pid, signal.SIGKILL)
            wait_gone(pid)
        self.daemon.ask("stopped", "a")

    @rule()
    def look(self) -> None:
        self.everything_is_as_it_should_be()

    def ask(self, path: str, *arguments: object, trouble: Trouble = NONE) -> bool:
        """Asks for an operation, in the middle of which something happens; whether it came about.
        If the daemon was killed, it did."""
        known = set(self.backups())
        held = list(self.now)
        before = set(self.daemon.ask("peace"))
        steps, again, victim = trouble
        hit = Victim.DAEMON
        tasks: dict[str, tuple[str, ...]] | None = None
        while tasks is None:
            try:
                if path:
                    self.daemon.ask("do", path, *arguments, steps=steps, victim=victim)
                    hit = victim if self.daemon.blown else hit
                tasks = self.daemon.ask("peace", steps=steps if victim is Victim.DAEMON else 0)
            except UndercroftError:
                hit = victim if self.daemon.blown else hit
                if hit is Victim.DAEMON:
                    return False
                path = ""
            except EOFError:
                self.daemon = Incarnation(self.data)
                path, steps, again = "", again, 0
        if hit is Victim.QEMU:
            self.daemon.ask("settled")
        new = {id: task for id, task in tasks.items() if id not in before}
        for verb, _, state, error, *_ in new.values():
            if hit is Victim.DAEMON:
                assert state == "succeeded", (verb, state, error)
            if state != "succeeded" and hit is Victim.DISK:
                # QEMU cannot give up writing to a layer when it has no room to note what changed.
                assert error.startswith("no-space: ") or '"write" lock' in error, (verb, error)
        for id in set(self.backups()) - known:
            self.expected[id] = held
        return bool(new) and all(task[2] == "succeeded" for task in new.values())

    def gone_back(self, done: bool, then: list[int]) -> None:
        """Going back to what the disk held ``then`` came about, or else not at all."""
        if done:
            self.now = list(then)
            return
        found = self.daemon.ask("read", "head", "a", PLACES, LENGTH)
        assert found in (self.now, then)
        self.now = found

    def backups(self) -> dict[str, Backup]:
        if not self.repository.exists():
            return {}
        try:
            found, damaged = Repository.open(self.repository).list()
        except UndercroftError:  # a daemon died while making it
            return {}
        assert not damaged
        return {backup.id: backup for backup in found}

    def everything_is_as_it_should_be(self) -> None:
        self.failed = True
        self.ask("")
        assert self.daemon.ask("findings") == []
        assert self.daemon.ask("read", "head", "a", PLACES, LENGTH) == self.now
        backups = self.backups()
        assert set(backups) == set(self.expected)
        packs = Repository.open(self.repository).packs(fresh=True)
        for id, backup in backups.items():
            assert verify(packs.get, backup, Stop()) == []
            held = dict(read_disk(packs.get, backup, backup.disks[0]))
            found = []
            for place in PLACES:
                chunk = held.get(place // 65536 * 65536, bytes(65536))
                at = place % 65536
                (value,) = set(chunk[at : at + LENGTH])
                found.append(value)
            assert found == self.expected[id], (backup.kind, backup.why, id)
            if backup.kind is BackupKind.INCREMENTAL:
                assert backup.read <= len(PLACES) * 65536
        packs.close()
        self.failed = False


TestBackups = Backups.TestCase
TestBackups.settings = settings(
    max_examples=int(os.environ.get("CROFT_EXAMPLES", "3")),
    stateful_step_count=20,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # not two runs are alike, so nothing can be shrunk
    suppress_health_check=list(HealthCheck),
)
