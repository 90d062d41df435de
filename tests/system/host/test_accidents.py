"""Snapshots, clones, templates and writes in any order, with the daemon killed at any step and QEMU
at any moment: every disk holds what a model says, byte for byte.

There are no guests: what one would write, `qemu-io` does, through the VM's own QEMU where it runs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.system.daemon.installation import wait_gone
from tests.system.host.incarnation import Incarnation, write_without_daemon
from undercroft.host import orphans
from undercroft.model.errors import UndercroftError
from undercroft.model.requests import (
    CloneMode,
    CloneRequest,
    RevertRequest,
    SnapshotCreate,
    StopRequest,
    TemplateCreate,
    VMCreate,
)
from undercroft.model.vm import RestartPolicy

MIB = 1 << 20
LENGTH = 4096
# Within clusters of qcow2 (64 KiB), at their edges, and in clusters that nothing else is in.
PLACES = [0, 4096, 61440, 65536, 131072, 200704, 1 * MIB, 3 * MIB, 3 * MIB + 65536]
FORCE = StopRequest(force=True)
BOOL = st.booleans()
PICK = st.integers(0, 11)
WRITES = st.lists(st.integers(0, len(PLACES) - 1), min_size=1, max_size=4)
LATER = st.lists(st.integers(0, len(PLACES) - 1), max_size=3)
# After how many steps the daemon dies, and the next one (0: not). A verb takes some hundred.
STEPS = st.one_of(st.just(0), st.integers(1, 250), st.integers(1, 1200))
KILLS = st.tuples(STEPS, STEPS)
Kills = tuple[int, int]


@dataclass
class Disk:
    """What each place of a disk may hold: one value, but where that is not known; and what else it
    may hold if QEMU is killed, because nobody flushed it since."""

    now: list[set[int]] = field(default_factory=lambda: [{0} for _ in PLACES])
    unflushed: list[set[int]] = field(default_factory=lambda: [set() for _ in PLACES])

    def write(self, place: int, value: int) -> None:
        self.unflushed[place] |= self.now[place]
        self.now[place] = {value}

    def flush(self) -> None:
        self.unflushed = [set() for _ in PLACES]

    def crash(self) -> None:
        self.now = [now | older for now, older in zip(self.now, self.unflushed, strict=True)]
        self.flush()

    def frozen(self, since: Disk | None = None) -> Disk:
        """It as it was at some moment between ``since`` and now."""
        since = since or self
        return Disk([now | then for now, then in zip(self.now, since.now, strict=True)])

    def hold(self, found: list[int]) -> None:
        """Holds it against what was found, and takes note of that."""
        for place, (may, value) in enumerate(zip(self.now, found, strict=True)):
            assert value in may, f"place {place} holds {value} and not one of {may}"
        self.now = [{value} for value in found]


class Accidents(RuleBasedStateMachine):
    """Three names of VMs, one daemon after another."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="croft-"))
        self.place.chmod(0o711)
        self.data = self.place / "data"
        self.daemon = Incarnation(self.data)
        self.disks: dict[str, Disk] = {}
        self.snapshots: dict[tuple[str, str], Disk] = {}
        self.frozen: dict[str, Disk] = {}  # templates, by id
        self.ids: dict[str, str] = {}
        self.seen: set[str] = set()
        self.value = 0
        self.number = 0
        self.templates: dict[str, str] = {}
        self.failed = False

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.everything_is_as_it_should_be()
        finally:
            self.daemon.kill()
            if self.data.exists():
                orphans.end_processes(self.data, set(orphans.marked_processes(self.data)))
            shutil.rmtree(self.place)

    # -- what is done -----------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.create(True, (0, 0))
        self.write(0, [0, 2, 5], True)

    @rule(start=st.booleans(), kills=KILLS)
    def create(self, start: bool, kills: Kills) -> None:
        request = VMCreate(
            name=self.new_name(),
            disk=4 * MIB,
            memory=64 * MIB,
            ports=(),
            start=start,
            restart=RestartPolicy.NEVER,
        )
        self.ask("vms.create", request, kills=kills)

    @rule(vm=PICK, verb=st.sampled_from(["start", "stop", "restart", "suspend"]), kills=KILLS)
    def switch(self, vm: int, verb: str, kills: Kills) -> None:
        arguments = (FORCE,) if verb in ("stop", "restart") else ()
        self.ask(f"vms.{verb}", self.vm(vm), *arguments, kills=kills)

    @rule(vm=PICK, kills=KILLS)
    def remove(self, vm: int, kills: Kills) -> None:
        if len(self.disks) > 1:
            self.ask("vms.remove", self.vm(vm), True, kills=kills)

    @rule(vm=PICK, writes=WRITES, flush=st.booleans())
    def write(self, vm: int, writes: list[int], flush: bool) -> None:
        name = self.vm(vm)
        self.daemon.ask("write", name, self.commands(name, writes, flush))

    @rule(vm=PICK, memory=st.booleans(), kills=KILLS, later=LATER)
    def take(self, vm: int, memory: bool, kills: Kills, later: list[int]) -> None:
        request = SnapshotCreate(memory=memory)
        self.ask("snapshots.create", self.vm(vm), request, kills=kills, later=later)

    @rule(snapshot=PICK, start=st.booleans(), kills=KILLS, later=LATER)
    def revert(self, snapshot: int, start: bool, kills: Kills, later: list[int]) -> None:
        for name in self.picked(self.snapshots, snapshot):
            request = RevertRequest(force=True, start=start)
            self.ask("snapshots.revert", *name, request, kills=kills, later=later)

    @rule(snapshot=PICK, kills=KILLS, later=LATER)
    def forget(self, snapshot: int, kills: Kills, later: list[int]) -> None:
        for name in self.picked(self.snapshots, snapshot):
            self.ask("snapshots.remove", *name, kills=kills, later=later)

    @rule(vm=PICK, mode=st.sampled_from(CloneMode), start=BOOL, kills=KILLS, later=LATER)
    def clone(self, vm: int, mode: CloneMode, start: bool, kills: Kills, later: list[int]) -> None:
        request = CloneRequest(names=(self.new_name(),), mode=mode, start=start)
        self.ask("vms.clone", self.vm(vm), request, kills=kills, later=later)

    @rule(vm=PICK, memory=st.booleans(), kills=KILLS, later=LATER)
    def make_template(self, vm: int, memory: bool, kills: Kills, later: list[int]) -> None:
        request = TemplateCreate(name=f"t{self.number}", source=self.vm(vm), memory=memory)
        self.number += 1
        self.ask("templates.create", request, kills=kills, later=later)

    @rule(template=PICK, full=st.booleans(), kills=KILLS)
    def clone_template(self, template: int, full: bool, kills: Kills) -> None:
        request = CloneRequest(names=(self.new_name(),), mode=CloneMode.FULL if full else None)
        for id in self.picked(self.templates, template):
            self.ask("templates.clone", id, request, kills=kills)

    @rule(template=PICK, kills=KILLS)
    def remove_template(self, template: int, kills: Kills) -> None:
        for id in self.picked(self.templates, template):
            self.ask("templates.remove", id, kills=kills)

    @rule(vm=PICK)
    def qemu_dies(self, vm: int) -> None:
        name = self.vm(vm)
        pids = [
            pid
            for pid, id in orphans.marked_processes(self.data).items()
            if id == self.ids.get(name)
        ]
        if not pids:
            return
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            wait_gone(pid)
        self.disks[name].crash()
        self.daemon.ask("stopped", name)
        self.disks[name].hold(self.daemon.ask("read", "head", name, PLACES, LENGTH))

    @rule()
    def peace(self) -> None:
        self.everything_is_as_it_should_be()

    def picked(self, things: Iterable[Any], number: int) -> list[Any]:
        """One of them, if there are any."""
        known = sorted(things)
        return known[number % len(known) :][:1] if known else []

    def vm(self, number: int) -> str:
        return str(self.picked(self.disks, number)[0])

    def new_name(self) -> str:
        self.number += 1
        return f"vm{self.number}"

    # -- how it is done ---------------------------------------------------------------------

    def ask(
        self,
        path: str,
        *arguments: Any,
        kills: Kills = (0, 0),
        later: list[int] | None = None,
    ) -> None:
        """Asks for an operation, of a daemon that is killed over it, as the next one may be.
        ``later``: what is written before there is another daemon."""
        before = {name: disk.frozen() for name, disk in self.disks.items()}
        steps, again = kills
        while True:
            try:
                if path:
                    self.daemon.ask("do", path, *arguments, steps=steps)
                tasks = self.daemon.ask("peace", steps=steps)
            except UndercroftError:
                return
            except EOFError:
                if later:
                    asyncio.run(self.write_without_daemon(later))
                self.daemon = Incarnation(self.data)
                path, steps, again, later = "", again, 0, None
                continue
            self.follow(tasks, before)
            return

    def follow(self, tasks: dict[str, Any], before: dict[str, Disk]) -> None:
        """Has the model follow what became of tasks. ``before``: the disks when those began."""
        for id in sorted(set(tasks) - self.seen, key=lambda id: tasks[id][0] == "vm.create"):
            verb, name, state, error, given = tasks[id]
            assert state == "succeeded", (verb, name, state, error)
            # What was written since it began may belong to it or not.
            disk = self.disks[name].frozen(before[name]) if name in before else Disk()
            if verb == "vm.create":
                known = self.frozen.get(str(given.get("template")), Disk())
                self.disks[name] = known.frozen()
            elif verb == "vm.remove":
                del self.disks[name]
                self.snapshots = {k: v for k, v in self.snapshots.items() if k[0] != name}
            elif verb == "snapshot.create":
                self.snapshots[name, given["name"]] = disk
            elif verb == "snapshot.revert":
                self.disks[name] = self.snapshots[name, given["name"]].frozen()
            elif verb == "snapshot.remove":
                del self.snapshots[name, given["name"]]
            elif verb == "template.create":
                self.frozen[given["template"]] = disk
            elif verb in ("vm.stop", "vm.suspend"):
                self.disks[name].flush()
        self.seen = set(tasks)
        self.ids = self.daemon.ask("ids")
        self.templates = self.daemon.ask("frozen")[1]

    def commands(self, name: str, writes: list[int], flush: bool) -> list[str]:
        commands = []
        for place in writes:
            self.value = self.value % 255 + 1
            self.disks[name].write(place, self.value)
            commands.append(f"write -P {self.value} {PLACES[place]} {LENGTH}")
        if flush:
            self.disks[name].flush()
            commands.append("flush")
        return commands

    async def write_without_daemon(self, writes: list[int]) -> None:
        """QEMU goes on while there is no daemon, and so does what a guest would do."""
        for name in self.disks:
            run = partial(self.commands, name, writes, True)
            await write_without_daemon(self.data, self.ids[name], run)

    def everything_is_as_it_should_be(self) -> None:
        self.failed = True
        self.ask("")
        assert self.daemon.ask("findings") == []
        assert set(self.ids) == set(self.disks)
        snapshots, templates = self.daemon.ask("frozen")
        assert set(snapshots) == set(self.snapshots)
        for name, disk in self.disks.items():
            disk.flush()
            disk.hold(self.daemon.ask("read", "head", name, PLACES, LENGTH))
        for key, disk in self.snapshots.items():
            disk.hold(self.daemon.ask("read", "layer", snapshots[key], PLACES, LENGTH))
        for id in templates:
            self.frozen[id].hold(self.daemon.ask("read", "layer", templates[id], PLACES, LENGTH))
        self.failed = False


TestAccidents = Accidents.TestCase
TestAccidents.settings = settings(
    max_examples=int(os.environ.get("CROFT_EXAMPLES", "6")),
    stateful_step_count=20,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # not two runs are alike, so nothing can be shrunk
    suppress_health_check=list(HealthCheck),
)
