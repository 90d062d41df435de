"""``croft start`` of a tiny VM until its userspace is up, against the same QEMU command line
started by hand and against libvirt; and where the difference goes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench import libvirt
from bench.byhand import ByHand
from bench.console import LIMIT
from bench.figures import Figure, Section, Series, Unit, alternate
from bench.installation import Installation, installation
from bench.processes import clean_environment, cpu_seconds
from undercroft.client.client import Client
from undercroft.model.requests import StopRequest
from undercroft.storage.build.tiny import READY_LINE

_VM = "started"
_MOST = 1.05  # times the start by hand
_OR_MORE = 0.060  # seconds, if that is more
_READY = READY_LINE.encode()


@dataclass
class Phases:
    """Where the time of ``croft start`` goes, in seconds, one list for each part."""

    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **parts: float) -> None:
        """Adds one run."""
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value)

    def table(self) -> str:
        """As Markdown."""
        rows = ["| part of `croft start` | median (range) |", "| --- | --- |"]
        for name, values in self.parts.items():
            text = Series(tuple(values)).text(Unit.SECONDS)
            rows.append(f"| {_PARTS[name]} | {text} |")
        return "\n".join(rows)


_PARTS = {
    "command": "process of `croft` until the request is with the operation (Python, imports, HTTP)",
    "queue": "request written down, until the VM's actor takes it up",
    "launch": "plan, command line, descriptors, QEMU executed",
    "monitor": "QEMU sets itself up and answers on its monitor (the guest boots from then on)",
    "told": "outcome written down, until `croft` has exited",
    "boot": "QEMU executed, until the line has come through the console API",
}


def run(directory: Path, runs: int) -> list[Section]:
    """The sections of both peers, measured in turn."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(installation(directory / "start"))
        ours.start_daemon()
        ours.image()
        ours.create(_VM)
        client = stack.enter_context(ours.client)
        by_hand = _learn(ours, client, directory)
        phases = Phases()
        cpu: dict[str, list[float]] = {"ours": [], "by hand": [], "libvirt": []}
        sides = {
            "ours": lambda: _start(ours, client, phases, cpu["ours"]),
            "by hand": lambda: by_hand.start(_READY, cpu["by hand"]),
        }
        missing = ""
        try:
            peer = _libvirt(stack, directory, by_hand)
            sides["libvirt"] = lambda: peer.start(
                _VM, directory / "libvirt-serial", _READY, cpu["libvirt"]
            )
        except libvirt.Unavailable as error:
            missing = str(error)
        found = alternate(runs, sides)
        phases.parts = {name: values[-runs:] for name, values in phases.parts.items()}
        used = {name: Series(tuple(values[-runs:])) for name, values in cpu.items() if values}
        client.vms.remove(_VM, force=True)
    return [_against_hand(found, used, phases), _against_libvirt(found, used, missing)]


def _learn(ours: Installation, client: Client, directory: Path) -> ByHand:
    """The command line that our VM is run with."""
    client.tasks.wait(client.vms.start(_VM), LIMIT)
    vm = client.vms.get(_VM)
    assert vm.status.instance is not None
    by_hand = ByHand.of(ours.data / "run/vms" / vm.meta.id, vm.status.instance.pid, directory)
    _stop(client)
    return by_hand


def _stop(client: Client) -> None:
    client.tasks.wait(client.vms.stop(_VM, StopRequest(force=True)), LIMIT)


def _start(ours: Installation, client: Client, phases: Phases, cpu: list[float]) -> float:
    """Seconds from executing ``croft start`` to the line, which is read through the console API
    as soon as croft has exited, with all that was said before. What processor time QEMU had used
    by then is added to ``cpu``."""
    # Wall-clock time too: that is what the daemon writes down.
    wall, began = time.time(), time.perf_counter()
    process = subprocess.Popen(
        ours.command("start", _VM),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=clean_environment(),
    )
    if process.wait():
        raise RuntimeError(f"croft start failed ({process.returncode})")
    exited = time.perf_counter()
    with client.vms.console(_VM, scrollback=65536) as console:
        seen = b""
        while _READY not in seen:
            data = console.receive(LIMIT)
            if not data:
                raise EOFError(f"the guest's console ended, having said: {seen[-500:]!r}")
            seen += data
        ready = time.perf_counter()
    vm = client.vms.get(_VM)
    task = max(client.tasks.list(), key=lambda task: task.meta.created)
    assert task.spec.verb == "vm.start"
    assert vm.status.instance is not None
    cpu.append(cpu_seconds(vm.status.instance.pid)[0])
    started, executed = task.status.started or 0.0, vm.status.instance.started
    finished = task.status.finished or 0.0
    phases.add(
        command=task.meta.created - wall,
        queue=started - task.meta.created,
        launch=executed - started,
        monitor=finished - executed,
        told=wall + (exited - began) - finished,
        boot=wall + (ready - began) - executed,
    )
    _stop(client)
    return ready - began


def _libvirt(stack: contextlib.ExitStack, directory: Path, by_hand: ByHand) -> libvirt.Libvirt:
    libvirt.install()
    peer = stack.enter_context(libvirt.libvirtd(directory / "libvirt"))
    xml = libvirt.domain_xml(by_hand.plan, by_hand.line, _VM, directory / "libvirt-serial")
    peer.define(_VM, xml)
    return peer


def _processor_time(used: dict[str, Series], peer: str) -> Figure:
    """Hardly depends on what else the machine does."""
    what = "of that, processor time of QEMU"
    return Figure(what, "", used["ours"], Unit.SECONDS, None, used.get(peer))


def _against_hand(found: dict[str, Series], used: dict[str, Series], phases: Phases) -> Section:
    ours, peer = found["ours"], found["by hand"]
    most = max(peer.median * _MOST, peer.median + _OR_MORE)
    figure = Figure(
        "`croft start` of the tiny VM to its userspace",
        f"≤ {_MOST} times, or +{_OR_MORE * 1000:.0f} ms",
        ours,
        Unit.SECONDS,
        ours.median <= most,
        peer,
    )
    return Section(
        "start",
        "Start, against QEMU by hand",
        "From executing `croft start` to the guest's line on the serial console, read through the "
        "API's console; by hand from executing QEMU, with the argument list of the VM's own "
        "process, to the same line.",
        [figure, _processor_time(used, "by hand")],
        "QEMU by hand",
        [phases.table()],
    )


def _against_libvirt(found: dict[str, Series], used: dict[str, Series], missing: str) -> Section:
    ours, peer = found["ours"], found.get("libvirt")
    figure = Figure(
        "`croft start` of the tiny VM to its userspace",
        "not slower",
        ours,
        Unit.SECONDS,
        None if peer is None else ours.median <= peer.median,
        peer,
    )
    return Section(
        "start",
        "Start, against libvirt",
        "The same runs; `virsh start` of a domain with the same kernel, board and devices at the "
        "same places, from executing virsh to the line on a serial port that is a socket of ours.",
        [figure, _processor_time(used, "libvirt")],
        "libvirt",
        [f"libvirt was not measured: {missing}."] if missing else [],
    )
