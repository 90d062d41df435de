"""1,000 VMs known, none running: how long a list takes, and what the daemon holds in memory,
against libvirt with as many domains."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from bench import libvirt
from bench.figures import Figure, Section, Series, Unit, alternate
from bench.installation import installation
from bench.processes import memory, timed
from bench.processes import run as execute
from undercroft.hypervisor.commandline import command_line
from undercroft.hypervisor.emulator import find_emulator
from undercroft.hypervisor.plan import MachinePlan, PlanPort
from undercroft.model.vm import Display

_COUNT = 1000
_LIST = 0.120  # seconds
_RESIDENT = 80e6  # bytes


def run(directory: Path, runs: int) -> list[Section]:
    """Both figures."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(installation(directory / "known"))
        ours.start_daemon()
        ours.stop_daemon()
        names = ours.know(_COUNT)
        ours.start_daemon()
        cpu: dict[str, list[float]] = {"ours": [], "libvirt": []}
        sides = {"ours": lambda: timed(ours.command("ls"), cpu["ours"])}
        missing = ""
        peer: libvirt.Libvirt | None = None
        try:
            libvirt.install()
            peer = stack.enter_context(libvirt.libvirtd(directory / "libvirt", _domains(names)))
            command = peer.virsh("list", "--all")
            _expect(execute(command), names)
            sides["libvirt"] = lambda: timed(command, cpu["libvirt"])
        except libvirt.Unavailable as error:
            missing = str(error)
        _expect(execute(ours.command("ls")), names)
        sides["version"] = lambda: timed(ours.command("--version"))
        found = alternate(runs, sides)
        processor = {name: Series(tuple(v[-runs:])) for name, v in cpu.items() if v}
        time.sleep(1.0)  # whatever was begun for the last request is over
        ours_memory = memory(ours.pid)
        peer_memory = None if peer is None else memory(peer.pid)
    return [_section(found, processor, ours_memory, peer_memory, missing)]


def _expect(output: bytes, names: list[str]) -> None:
    words = set(output.decode().split())
    if not words.issuperset(names):
        raise RuntimeError(f"a list has only {len(words & set(names))} of {len(names)} VMs")


def _domains(names: list[str]) -> list[str]:
    plan = MachinePlan(
        id="known",
        name="known",
        uuid="",
        directory="/",
        run_directory="/",
        display=Display.STD,
        memory=512 << 20,
        ports=(PlanPort(mac="52:54:00:01:00:00"),),
    )
    line = command_line(plan, asyncio.run(find_emulator(plan.arch)))
    return [libvirt.domain_xml(plan, line, name, Path("/none")) for name in names]


def _section(
    found: dict[str, Series],
    cpu: dict[str, Series],
    ours: tuple[int, int],
    peer: tuple[int, int] | None,
    missing: str,
) -> Section:
    def series(value: float) -> Series:
        return Series((float(value),))

    shown = found["ours"]
    figures = [
        Figure(
            "`croft ls`, against `virsh list --all`",
            f"≤ {_LIST * 1000:.0f} ms",
            shown,
            Unit.SECONDS,
            shown.median <= _LIST,
            found.get("libvirt"),
        ),
        Figure(
            "of that, processor time of the command itself",
            "",
            cpu["ours"],
            Unit.SECONDS,
            None,
            cpu.get("libvirt"),
        ),
        Figure(
            "a command that does nothing (`croft --version`)",
            "",
            found["version"],
            Unit.SECONDS,
            None,
        ),
        Figure(
            "daemon, resident (RSS)",
            f"≤ {Unit.BYTES.text(_RESIDENT)}",
            series(ours[0]),
            Unit.BYTES,
            ours[0] <= _RESIDENT,
            None if peer is None else series(peer[0]),
        ),
        Figure(
            "daemon, its share of shared pages only (PSS)",
            "",
            series(ours[1]),
            Unit.BYTES,
            None,
            None if peer is None else series(peer[1]),
        ),
    ]
    return Section(
        "known",
        f"{_COUNT:,} VMs known",
        "Each list from executing the command to its exit, its output read through a pipe; memory "
        "of both daemons after these lists.",
        figures,
        "libvirt",
        [f"libvirt was not measured: {missing}."] if missing else [],
    )
