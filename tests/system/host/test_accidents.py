"""Snapshots, clones, templates, exports, imports and writes in any order, with the daemon or QEMU
killed or the disk full at any step of any of them: every disk holds what a model says, byte for
byte.

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
from tests.system.host.fuse import NONE, Trouble, Victim, remove_disk, small_disk, troubles
from tests.system.host.incarnation import Incarnation, write_without_daemon
from undercroft.host import orphans
from undercroft.model.errors import UndercroftError
from undercroft.model.export import ExportFormat
from undercroft.model.requests import (
    CloneMode,
    CloneRequest,
    RevertRequest,
    SnapshotCreate,
    StopRequest,
    TemplateCreate,
    VMChange,
    VMCreate,
)
from undercroft.model.transfer import ExportCreate, ImportCreate
from undercroft.model.vm import DiskBus, RestartPolicy

MIB = 1 << 20
LENGTH = 4096
# Within clusters of qcow2 (64 KiB), at their edges, and in clusters that nothing else is in.
PLACES = [0, 4096, 61440, 65536, 131072, 200704, 1 * MIB, 3 * MIB, 3 * MIB + 65536]
FORCE = StopRequest(force=True)
BOOL = st.booleans()
PICK = st.integers(0, 11)
WRITES = st.lists(st.integers(0, len(PLACES) - 1), min_size=1, max_size=4)
LATER = st.lists(st.integers(0, len(PLACES) - 1), max_size=3)
# A verb takes some hundred steps.
TROUBLE = troubles(st.just(0), st.integers(1, 250), st.integers(1, 1200))
FORMATS = [ExportFormat.OVA, ExportFormat.QCOW2, ExportFormat.VHDX]
SIZE = 256 * MIB  # of the disk: some must be free for exports


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
        self.disk = small_disk(self.place, SIZE)
        self.data = self.disk / "data"
        self.daemon = Incarnation(self.data)
        self.disks: dict[str, Disk] = {}
        self.snapshots: dict[tuple[str, str], Disk] = {}
        self.frozen: dict[str, Disk] = {}  # templates, by id
        self.carried = Disk()  # by an export
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
            remove_disk(self.disk)
            shutil.rmtree(self.place)

    # -- what is done -----------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.create(True, NONE)
        self.write(0, [0, 2, 5], True)

    @rule(start=st.booleans(), trouble=TROUBLE)
    def create(self, start: bool, trouble: Trouble) -> None:
        request = VMCreate(
            name=self.new_name(),
            disk=4 * MIB,
            memory=16 * MIB,
            ports=(),
            start=start,
            restart=RestartPolicy.NEVER,
        )
        self.ask("vms.create", request, trouble=trouble)

    @rule(vm=PICK, verb=st.sampled_from(["start", "stop", "restart", "suspend"]), trouble=TROUBLE)
    def switch(self, vm: int, verb: str, trouble: Trouble) -> None:
        arguments = (FORCE,) if verb in ("stop", "restart") else ()
        self.ask(f"vms.{verb}", self.vm(vm), *arguments, trouble=trouble)

    @rule(vm=PICK, trouble=TROUBLE)
    def remove(self, vm: int, trouble: Trouble) -> None:
        if len(self.disks) > 1:
            self.ask("vms.remove", self.vm(vm), True, trouble=trouble)

    @rule(vm=PICK, writes=WRITES, flush=st.booleans())
    def write(self, vm: int, writes: list[int], flush: bool) -> None:
        name = self.vm(vm)
        self.daemon.ask("write", name, self.commands(name, writes, flush))

    @rule(vm=PICK, memory=st.booleans(), trouble=TROUBLE, later=LATER)
    def take(self, vm: int, memory: bool, trouble: Trouble, later: list[int]) -> None:
        request = SnapshotCreate(memory=memory)
        self.ask("snapshots.create", self.vm(vm), request, trouble=trouble, later=later)

    @rule(snapshot=PICK, start=st.booleans(), trouble=TROUBLE, later=LATER)
    def revert(self, snapshot: int, start: bool, trouble: Trouble, later: list[int]) -> None:
        for name in self.picked(self.snapshots, snapshot):
            request = RevertRequest(force=True, start=start)
            self.ask("snapshots.revert", *name, request, trouble=trouble, later=later)

    @rule(snapshot=PICK, trouble=TROUBLE, later=LATER)
    def forget(self, snapshot: int, trouble: Trouble, later: list[int]) -> None:
        for name in self.picked(self.snapshots, snapshot):
            self.ask("snapshots.remove", *name, trouble=trouble, later=later)

    @rule(vm=PICK, mode=st.sampled_from(CloneMode), start=BOOL, trouble=TROUBLE, later=LATER)
    def clone(
        self, vm: int, mode: CloneMode, start: bool, trouble: Trouble, later: list[int]
    ) -> None:
        request = CloneRequest(names=(self.new_name(),), mode=mode, start=start)
        self.ask("vms.clone", self.vm(vm), request, trouble=trouble, later=later)

    @rule(vm=PICK, memory=st.booleans(), trouble=TROUBLE, later=LATER)
    def make_template(self, vm: int, memory: bool, trouble: Trouble, later: list[int]) -> None:
        request = TemplateCreate(name=f"t{self.number}", source=self.vm(vm), memory=memory)
        self.number += 1
        self.ask("templates.create", request, trouble=trouble, later=later)

    @rule(template=PICK, full=st.booleans(), trouble=TROUBLE)
    def clone_template(self, template: int, full: bool, trouble: Trouble) -> None:
        request = CloneRequest(names=(self.new_name(),), mode=CloneMode.FULL if full else None)
        for id in self.picked(self.templates, template):
            self.ask("templates.clone", id, request, trouble=trouble)

    @rule(template=PICK, trouble=TROUBLE)
    def remove_template(self, template: int, trouble: Trouble) -> None:
        for id in self.picked(self.templates, template):
            self.ask("templates.remove", id, trouble=trouble)

    @rule(vm=PICK, format=st.sampled_from(FORMATS), out=TROUBLE, back=TROUBLE, later=LATER)
    def carry(
        self, vm: int, format: ExportFormat, out: Trouble, back: Trouble, later: list[int]
    ) -> None:
        """A VM leaves as a file, and comes back as another."""
        name, new = self.vm(vm), self.new_name()
        before = self.disks[name].frozen()
        request = ExportCreate(vm=name, format=format)
        self.ask("exports.create", request, trouble=out, later=later)
        for path in self.data.glob("exports/*/*"):
            self.carried = self.disks[name].frozen(before)
            importing = ImportCreate(path=str(path), file=path.name, name=new, bus=DiskBus.VIRTIO)
            self.ask("imports.create", importing, trouble=back)
            self.ask("exports.remove", path.parent.name)
        if new in self.disks:
            self.ask("vms.set", new, VMChange(restart=RestartPolicy.NEVER))

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
        trouble: Trouble = NONE,
        later: list[int] | None = None,
    ) -> None:
        """Asks for an operation, in the middle of which something happens. ``later``: what is
        written before there is another daemon, if it was that."""
        before = {name: disk.frozen() for name, disk in self.disks.items()}
        steps, again, victim = trouble
        self.failed = True
        while True:
            try:
                if path:
                    self.daemon.ask("do", path, *arguments, steps=steps, victim=victim)
            except UndercroftError:
                pass
            except EOFError:
                if later:
                    asyncio.run(self.write_without_daemon(later))
                self.daemon = Incarnation(self.data)
                path, steps, again, later = "", again, 0, None
                continue
            hit = victim if path and self.daemon.blown else Victim.DAEMON
            if hit is Victim.QEMU:
                self.daemon.ask("settled")
                for disk in self.disks.values():
                    disk.crash()
            try:
                tasks = self.daemon.ask("peace", steps=steps if victim is Victim.DAEMON else 0)
            except EOFError:
                self.daemon = Incarnation(self.data)
                path, steps, again, later = "", again, 0, None
                continue
            self.follow(tasks, before, hit)
            self.failed = False
            return

    def follow(self, tasks: dict[str, Any], before: dict[str, Disk], hit: Victim) -> None:
        """Has the model follow what became of tasks. ``before``: the disks when those began.
        ``hit``: the daemon, after which all comes about all the same, or another."""
        self.ids = self.daemon.ask("ids")
        snapshots, self.templates = self.daemon.ask("frozen")
        for id in sorted(set(tasks) - self.seen, key=lambda id: tasks[id][0] == "vm.create"):
            verb, name, state, error, given = tasks[id]
            done = state == "succeeded"
            if not done:
                assert state == "failed", (verb, name, state)
                assert hit is not Victim.DAEMON, (verb, name, state, error)
                assert hit is Victim.QEMU or error.startswith("no-space: "), (verb, error)
                assert "fault of Undercroft" not in error
            # What was written since it began may belong to it or not.
            disk = self.disks[name].frozen(before[name]) if name in before else Disk()
            if verb == "vm.create" and (done or name in self.ids):
                known = self.frozen.get(str(given.get("template")), Disk())
                known = self.carried if "import" in given else known
                self.disks[name] = known.frozen()
            elif verb == "vm.remove" and (done or name not in self.ids):
                del self.disks[name]
                self.snapshots = {k: v for k, v in self.snapshots.items() if k[0] != name}
            elif verb == "snapshot.create" and done:
                self.snapshots[name, given["name"]] = disk
            elif verb == "snapshot.revert":
                then = self.snapshots[name, given["name"]]
                self.disks[name] = then.frozen() if done else then.frozen(self.disks[name])
            elif verb == "snapshot.remove" and (done or (name, given["name"]) not in snapshots):
                del self.snapshots[name, given["name"]]
            elif verb == "template.create" and done:
                self.frozen[given["template"]] = disk
            elif verb in ("vm.stop", "vm.suspend") and done:
                self.disks[name].flush()
        self.seen = set(tasks)

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
        self.ask("")
        self.failed = True
        assert self.daemon.ask("findings") == []
        assert set(self.ids) == set(self.disks)
        half_made = [p for place in ("tmp", "exports") for p in (self.data / place).iterdir()]
        assert half_made == []
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
