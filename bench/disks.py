"""Linked clones of a large volume, against ``qemu-img create -b``; and how long a guest stands
still for a snapshot, against QEMU by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.byhand import ByHand
from bench.console import LIMIT
from bench.figures import Figure, Section, Series, Unit, alternate
from bench.forks import Channel
from bench.guests import until_answers
from bench.installation import Installation, installation
from bench.processes import timed
from bench.stopped import BUSY, numbered, stopped
from undercroft.client.client import Client
from undercroft.model.requests import ExecRequest, SnapshotCreate, VolumeClone
from undercroft.model.units import GiB, MiB
from undercroft.storage.build.tiny import READY_LINE

_SIZE = 20 * GiB
_FILLED = 256 * MiB
_CLONE = 0.050  # seconds
_STOPPED = 0.010  # seconds
_VM = "busy"
_MEMORY = 256 * MiB


def run(directory: Path, runs: int) -> list[Section]:
    """Both."""
    with installation(directory / "disks") as ours:
        ours.start_daemon()
        ours.image()
        with ours.client as client:
            return [_linked(ours, client, directory, runs), _live(ours, client, directory, runs)]


def _linked(ours: Installation, client: Client, directory: Path, runs: int) -> Section:
    disk = directory / "large.raw"
    with disk.open("wb") as file:
        file.truncate(_SIZE)
        file.seek(GiB)
        for _ in range(_FILLED // MiB):
            file.write(b"\xa5" * MiB)
    ours.croft("import", str(disk), "large", "--network", "none")
    disk.unlink()
    source = "large-boot"
    head = client.volumes.get(source).status.head
    base, new = ours.data / f"volumes/{head}.qcow2", directory / "linked.qcow2"
    by_hand = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(new)]

    def removed(measure: Callable[[], float], name: str) -> Callable[[], float]:
        def measured() -> float:
            took = measure()
            client.tasks.wait(client.volumes.remove(name), LIMIT)
            return took

        return measured

    def ask() -> float:
        began = time.perf_counter()
        client.tasks.wait(client.volumes.clone(source, VolumeClone(name="asked")), LIMIT)
        return time.perf_counter() - began

    def peer() -> float:
        new.unlink(missing_ok=True)
        return timed(by_hand)

    def command() -> float:
        return timed(ours.command("--quiet", "volume", "clone", source, "told"))

    sides = {"ours": removed(ask, "asked"), "peer": peer, "command": removed(command, "told")}
    sides["nothing"] = lambda: timed(ours.command("--version"))
    found = alternate(runs, sides)
    new.unlink()
    ours.croft("rm", "--force", "large")
    clone, must = found["ours"], f"≤ {_CLONE * 1000:.0f} ms"
    return Section(
        "disks",
        f"Linked clone of a volume of {_SIZE // GiB} GiB",
        f"A volume that holds {_FILLED // MiB} MiB. From sending the request to the API until the "
        "new volume is there, durably and written down; by hand the process of qemu-img.",
        [
            Figure(
                "linked clone, asked of the API",
                must,
                clone,
                Unit.SECONDS,
                clone.median <= _CLONE,
                found["peer"],
            ),
            Figure("`croft volume clone`", "", found["command"], Unit.SECONDS, None, found["peer"]),
            Figure(
                "a command that does nothing (`croft --version`)",
                "",
                found["nothing"],
                Unit.SECONDS,
                None,
            ),
        ],
        "qemu-img create -b",
    )


def _live(ours: Installation, client: Client, directory: Path, runs: int) -> Section:
    shape = ("--memory", f"{_MEMORY // MiB}M", "--disk", "1G", "--network", "none")
    ours.croft("run", "tiny", "--name", _VM, *shape)
    vm = until_answers(client, _VM)
    client.vms.exec(_VM, ExecRequest(argv=("sh", "-c", f"({BUSY}) > /dev/null 2>&1 &")))
    assert vm.status.instance is not None
    pid = vm.status.instance.pid
    names = numbered("s")
    stood: list[float] = []

    def snapshot(memory: bool) -> float:
        request = SnapshotCreate(name=next(names), memory=memory)
        create = client.snapshots.create
        took = stopped(pid, lambda: client.tasks.wait(create(_VM, request), LIMIT))
        if memory:
            told = client.snapshots.get(_VM, request.name or "").status.stood_still
            if told is None:
                raise RuntimeError("it is not told how long the guest stood still")
            stood.append(told)
        client.tasks.wait(client.snapshots.remove(_VM, request.name or ""), LIMIT)
        return took

    quiet = alternate(runs, {"nothing": lambda: stopped(pid, lambda: time.sleep(0.5))})
    mine = alternate(
        runs, {"disks": lambda: snapshot(memory=False), "memory": lambda: snapshot(memory=True)}
    )
    mine["stopped"] = Series(tuple(stood[-runs:]))
    by_hand = ByHand.of(ours.data / "run/vms" / vm.meta.id, pid, directory)
    ours.croft("stop", "--force", _VM)
    theirs = _by_hand(by_hand, directory, runs)
    ours.croft("rm", "--force", _VM)
    return _stood_still(mine, theirs, quiet["nothing"])


def _by_hand(by_hand: ByHand, directory: Path, runs: int) -> dict[str, Series]:
    """The same with QEMU by hand: an overlay beneath the guest, and ``savevm``."""
    with by_hand.running("serial", "qmp", "agent") as running:
        running.sockets["serial"].wait_for(READY_LINE.encode())
        monitor = Channel(running.sockets["qmp"].connection)
        monitor.receive()
        monitor.execute("qmp_capabilities")
        agent = Channel(running.sockets["agent"].connection)
        agent.execute("guest-exec", path="/bin/sh", arg=["-c", BUSY])
        pid = running.process.pid
        names = numbered("by-hand-")
        (node,) = {
            info["inserted"]["node-name"]
            for info in monitor.execute("query-block")
            if info.get("inserted")
        }

        def overlay() -> float:
            nonlocal node
            name = next(names)
            path = directory / f"{name}.qcow2"
            took = stopped(
                pid,
                lambda: monitor.execute(
                    "blockdev-snapshot-sync",
                    **{"node-name": node, "snapshot-node-name": name, "snapshot-file": str(path)},
                ),
            )
            node = name
            return took

        def save() -> float:
            line = {"command-line": f"savevm {next(names)}"}
            took = stopped(pid, lambda: monitor.execute("human-monitor-command", **line))
            stood.append(monitor.stood())
            return took

        stood: list[float] = []
        found = alternate(runs, {"disks": overlay, "memory": save})
        return found | {"stopped": Series(tuple(stood[-runs:]))}


def _stood_still(
    mine: Mapping[str, Series], theirs: Mapping[str, Series], quiet: Series
) -> Section:
    def figure(what: str, kind: str, *, judged: bool) -> Figure:
        ours = mine[kind]
        must = f"≤ {_STOPPED * 1000:.0f} ms" if judged else ""
        reached = ours.median <= _STOPPED if judged else None
        return Figure(what, must, ours, Unit.SECONDS, reached, theirs[kind])

    return Section(
        "disks",
        "Snapshots of a running VM: how long its guest is stopped",
        f"A tiny VM with {_MEMORY // MiB} MiB whose processor is kept busy. Stopped is from QEMU's "
        "event STOP to RESUME, of which a snapshot of disks has none. Standing still, as seen from "
        "outside, is all time in which the thread of its processor neither ran nor waited for a "
        "core of the host: also the many waits, each of less than a millisecond or a few, of a "
        "processor whose memory is being written out. By hand `blockdev-snapshot-sync`, and "
        "`savevm`.",
        [
            figure("snapshot of its disks: stands still", "disks", judged=True),
            figure("snapshot with its memory: stopped", "stopped", judged=True),
            figure("snapshot with its memory: stands still, all in all", "memory", judged=False),
            Figure("stands still while nothing is done with it", "", quiet, Unit.SECONDS, None),
        ],
        "QEMU by hand",
    )
