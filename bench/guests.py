"""VMs of one image that come to be in different ways: how long each takes until the agent of its
guest has answered with its own name."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from bench.console import LIMIT
from bench.installation import Installation
from bench.processes import age, clean_environment, used_seconds
from undercroft.client.client import Client
from undercroft.hypervisor.launch import read_plan
from undercroft.model.requests import ExecRequest
from undercroft.model.task import Task
from undercroft.model.vm import VM

TEMPLATE = "frozen"
SOURCE = "source"
_FIRST = "first"
_HELD = 2  # VMs that the daemon holds ready on a template
_BOOT = 900.0  # seconds that a guest may take, under emulation
_LOOK = 0.01
_SETTLED = 3.0  # seconds that a guest gets after its agent's first answer
_LOADED = 0.7  # seconds from a QEMU's start until it has loaded what it goes on from


@dataclass
class Guests:
    """VMs that go again when they were measured. ``cpu``: the processor seconds of their QEMUs by
    then; ``tasks``: what making them took in the daemon, in seconds; both by kind."""

    ours: Installation
    client: Client
    image: str
    shape: Sequence[str] = ()
    cpu: dict[str, list[float]] = field(default_factory=dict)
    tasks: dict[str, list[float]] = field(default_factory=dict)
    _number: int = 0

    def source(self) -> float:
        """Seconds of a cold boot of a VM of which a template is made; it runs on."""
        took = self._start(["run", self.image, "--cold", "--name", SOURCE, *self.shape], SOURCE)[0]
        time.sleep(_SETTLED)
        self.ours.croft("template", "create", TEMPLATE, "--from", SOURCE, "--memory")
        return took

    def boot(self) -> float:
        """Seconds of a cold boot."""
        return self._measure("boot", "run", self.image, "--cold", *self.shape)[0]

    def first_run(self, limit: float) -> float:
        """Seconds of a ``croft run`` that nothing is there for to go on from. The VM stays until
        the daemon, which boots the image once more by itself, has a warm template of it.

        Raises:
            RuntimeError: that takes longer than ``limit`` seconds.
        """
        words = ["run", self.image, "--name", _FIRST, *self.shape]
        took = self._start(words, _FIRST)[0]
        self.warm_template(limit)
        self.client.tasks.wait(self.client.vms.remove(_FIRST, force=True), LIMIT)
        return took

    def clone(self) -> float:
        """Seconds of an instant clone of the template, whose QEMU has to be started.

        Raises:
            RuntimeError: it had been.
        """
        return self._clone("clone", held=False)

    def held(self) -> float:
        """Seconds of an instant clone of the template for which a VM was held ready.

        Raises:
            RuntimeError: none was.
        """
        self.wait_held(self.client.templates.get(TEMPLATE).meta.id)
        return self._clone("held", held=True)

    def of_running(self) -> float:
        """Seconds of an instant clone of the running source, which is frozen for that."""
        return self._measure("running", "clone", SOURCE, "--instant")[0]

    def run(self, *, held: bool = True) -> float:
        """Seconds of a ``croft run`` that goes on from the image's warm template; ``held``: for
        which VMs are held ready, as they are once it was used.

        Raises:
            RuntimeError: it booted.
        """
        if held:
            self.wait_held(self.warm_template(LIMIT))
        took, task, _ = self._measure("warm", "run", self.image, *self.shape)
        if "template" not in task.status.result:
            raise RuntimeError(f"croft run {self.image} booted, although it could go on")
        return took

    def warm_template(self, limit: float) -> str:
        """The id of the image's warm template, once it is there.

        Raises:
            RuntimeError: that takes longer than ``limit`` seconds.
        """
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            for template in self.client.templates.list():
                if template.spec.warm and template.status.memory:
                    return template.meta.id
            time.sleep(1.0)
        raise RuntimeError(f"there is no warm template of {self.image} yet")

    def wait_held(self, template: str) -> None:
        """Until VMs are held ready on a template (an id).

        Raises:
            RuntimeError: they are not.
        """
        deadline = time.monotonic() + LIMIT
        while self._held(template) < _HELD:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no VMs are held ready of {self.image}")
            time.sleep(0.2)
        time.sleep(_LOADED)

    def _held(self, template: str) -> int:
        """How many QEMUs have been started for it that are nobody's yet, which the API does not
        tell."""
        found = 0
        for run in (self.ours.data / "run/vms").iterdir():
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                plan = read_plan(run)
                waits = plan.name.startswith("pool-")
                found += waits and plan.incoming is not None and template in plan.incoming
        return found

    def _clone(self, kind: str, *, held: bool) -> float:
        asked = time.monotonic()
        took, _, older = self._measure(kind, "clone", TEMPLATE)
        if (older > time.monotonic() - asked) is not held:
            raise RuntimeError(f"the clone of {self.image} was {'not ' if held else ''}held ready")
        return took

    def _measure(self, kind: str, verb: str, what: str, *words: str) -> tuple[float, Task, float]:
        """Seconds that a new VM took, its task, and the age of its QEMU; the VM is gone again."""
        self._number += 1
        name = f"guest-{self._number}"
        names = ["--name", name] if verb == "run" else [name]
        took, vm, cpu = self._start([verb, what, *names, *words], name)
        assert vm.status.instance is not None
        older = age(vm.status.instance.pid)
        made = [task for task in self.client.tasks.list() if task.spec.object.id == vm.meta.id]
        task = max(made, key=lambda task: task.meta.created)
        self.cpu.setdefault(kind, []).append(cpu)
        spent = (task.status.finished or 0.0) - task.meta.created
        self.tasks.setdefault(kind, []).append(spent)
        self.client.tasks.wait(self.client.vms.remove(name, force=True), LIMIT)
        return took, task, older

    def _start(self, words: Sequence[str], name: str) -> tuple[float, VM, float]:
        """Seconds from executing croft until the guest's agent answers; the VM, and the processor
        time of its QEMU by then.

        Raises:
            RuntimeError: it failed; the agent does not answer; the guest has another name.
        """
        began = time.perf_counter()
        process = subprocess.Popen(
            self.ours.command("--quiet", *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=clean_environment(),
        )
        said = process.communicate()[1].decode(errors="replace")
        if process.returncode:
            raise RuntimeError(f"croft {' '.join(words)} failed: {said}")
        vm = until_answers(self.client, name)
        took = time.perf_counter() - began
        assert vm.status.instance is not None
        cpu = used_seconds(vm.status.instance.pid)
        check_name(self.client, name)
        return took, vm, cpu


def until_answers(client: Client, name: str) -> VM:
    """The VM, once its guest's agent answers.

    Raises:
        RuntimeError: it does not.
    """
    deadline = time.monotonic() + _BOOT
    while not (vm := client.vms.get(name)).status.agent:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the agent of {name} does not answer")
        time.sleep(_LOOK)
    return vm


def check_name(client: Client, name: str) -> None:
    """Asks a guest what it is called.

    Raises:
        RuntimeError: otherwise than its VM.
    """
    told = client.vms.exec(name, ExecRequest(argv=("hostname",))).stdout.decode().strip()
    if told != name:
        raise RuntimeError(f"the guest of {name} calls itself {told}")
