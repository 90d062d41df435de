"""Backups: a full one, and one when a hundredth of the blocks has changed, against QEMU by hand."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.console import LIMIT, Listener
from bench.figures import Figure, Section, Series, Unit
from bench.forks import Channel
from bench.guests import until_answers
from bench.installation import installation
from bench.processes import run as program
from undercroft.client.client import Client
from undercroft.model.backup import CHUNK, BackupCreate, BackupKind
from undercroft.model.requests import ExecRequest
from undercroft.model.units import GiB, MiB

_SIZE = 4 * GiB
_DATA = GiB
_FIRST = MiB  # where the data begin
_STEP = 100  # of so many chunks one is changed
_SHARE = 1 / _STEP
_MOST = 1.5  # times the share that changed
_VM = "writes"
_DISK = "data"
_COUNT = _DATA // CHUNK // _STEP
_CHANGE = f"""
i=0
while [ $i -lt {_COUNT} ]; do
  dd if=/dev/urandom of=/dev/vda bs={CHUNK} count=1 seek=$(({_FIRST // CHUNK} + i * {_STEP})) \
    conv=notrunc 2> /dev/null || exit 1
  i=$((i + 1))
done
sync
"""
_KINDS = {
    "full": "full backup",
    "nothing": "the next, when nothing has changed",
    "changed": f"the next, when {_SHARE * 100:.0f} % of the blocks have changed",
}


@dataclass
class Side:
    """What one side took and read and wrote, by kind, in seconds and bytes."""

    took: dict[str, list[float]] = field(default_factory=dict)
    read: dict[str, list[float]] = field(default_factory=dict)
    written: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, took: float, read: float, written: float) -> None:
        """Adds one backup."""
        for values, value in ((self.took, took), (self.read, read), (self.written, written)):
            values.setdefault(kind, []).append(value)


def run(directory: Path, runs: int) -> list[Section]:
    """Backups of a disk that a guest writes to, and by hand of the same disk."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(installation(directory / "backups"))
        ours.start_daemon()
        ours.image()
        client = stack.enter_context(ours.client)
        disk = directory / "disk.raw"
        _fill(disk)
        ours.croft("import", str(disk), "holder", "--network", "none")
        ours.croft("volume", "clone", "holder-boot", _DISK)
        ours.croft("run", "tiny", "--name", _VM, "--volume", _DISK, "--network", "none")
        until_answers(client, _VM)
        mine, theirs = Side(), Side()
        for _ in range(runs):
            _ours(client, directory / "repository", mine)
            _by_hand(disk, directory, theirs)
        ours.croft("rm", "--force", _VM)
    return [_section(mine, theirs)]


def _fill(path: Path) -> None:
    with path.open("wb") as disk:
        disk.truncate(_SIZE)
        disk.seek(_FIRST)
        for _ in range(_DATA // MiB):
            disk.write(os.urandom(MiB))


def _ours(client: Client, repository: Path, side: Side) -> None:
    """A full backup into a new repository, and those after it."""
    for kind in _KINDS:
        if kind == "changed":
            done = client.vms.exec(_VM, ExecRequest(argv=("sh", "-c", _CHANGE), timeout=LIMIT))
            if done.exit_code:
                raise RuntimeError(f"the guest cannot write: {done.stderr.decode()}")
        os.sync()
        before = _size(repository)
        began = time.perf_counter()
        task = client.backups.create(_VM, BackupCreate(repository=str(repository)))
        result = client.tasks.wait(task, LIMIT).status.result
        took = time.perf_counter() - began
        wanted = BackupKind.FULL if kind == "full" else BackupKind.INCREMENTAL
        if result["kind"] != wanted:
            raise RuntimeError(f"the {kind} backup is {result['kind']}: {result.get('why')}")
        side.add(kind, took, float(result["read"]), _size(repository) - before)
    shutil.rmtree(repository)


def _size(path: Path) -> float:
    """What is in a directory or file, in bytes on the host."""
    files = [path] if path.is_file() else path.rglob("*")
    return float(sum(file.stat().st_blocks * 512 for file in files if file.is_file()))


def _by_hand(disk: Path, directory: Path, side: Side) -> None:
    """The same with QEMU's own jobs and bitmap, from a qcow2 file with the same content."""
    source = directory / "by-hand.qcow2"
    if not source.exists():
        program(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(source)])
    with _qemu(source, directory) as monitor:
        monitor.execute("block-dirty-bitmap-add", node="disk", name="changed", granularity=CHUNK)
        for kind in _KINDS:
            if kind == "changed":
                for number in range(_COUNT):
                    at = _FIRST + number * _STEP * CHUNK
                    line = f'qemu-io disk "write -P {number % 255 + 1} {at} {CHUNK}"'
                    monitor.execute("human-monitor-command", **{"command-line": line})
            os.sync()
            target = directory / f"by-hand-{kind}.qcow2"
            began = time.perf_counter()
            _back_up(monitor, target, full=kind == "full")
            program(["sync", str(target)])
            size = _size(target)
            side.add(kind, time.perf_counter() - began, size, size)
            target.unlink()


def _back_up(monitor: Channel, target: Path, *, full: bool) -> None:
    how = {"sync": "full"} if full else {"sync": "incremental", "bitmap": "changed"}
    monitor.execute(
        "drive-backup",
        **{"job-id": "backup", "device": "disk", "target": str(target), "format": "qcow2"},
        **how,
    )
    if error := monitor.event("BLOCK_JOB_COMPLETED").get("error"):
        raise RuntimeError(f"QEMU cannot back it up: {error}")
    if full:
        monitor.execute("block-dirty-bitmap-clear", node="disk", name="changed")


@contextlib.contextmanager
def _qemu(source: Path, directory: Path) -> Iterator[Channel]:
    """A QEMU without a machine that has the file as ``disk``."""
    with Listener(directory / "monitor") as listener:
        listener.connect()
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S",
             "-blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={source}",
             "-chardev", f"socket,id=qmp,fd={listener.socket.fileno()},server=on,wait=off",
             "-mon", "chardev=qmp,mode=control"],
            pass_fds=(listener.socket.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            monitor = Channel(listener.connection)
            monitor.receive()
            monitor.execute("qmp_capabilities")
            yield monitor
        finally:
            process.kill()
            process.wait()


def _section(mine: Side, theirs: Side) -> Section:
    def series(values: dict[str, list[float]], kind: str) -> Series:
        return Series(tuple(values[kind]))

    full, nothing, changed = (series(mine.took, kind).median for kind in _KINDS)
    most = _MOST * _SHARE
    read = series(mine.read, "changed").median / series(mine.read, "full").median
    figures = []
    for kind, text in _KINDS.items():
        ours, peer = series(mine.took, kind), series(theirs.took, kind)
        judged = kind == "changed"
        must = f"≤ {_MOST} % of a full one more than if nothing has" if judged else ""
        reached = changed - nothing <= most * full if judged else None
        figures.append(Figure(text, must, ours, Unit.SECONDS, reached, peer))
    for kind, text in _KINDS.items():
        judged = kind == "changed"
        reached = read <= most if judged else None
        must = f"≤ {_MOST} % of a full one" if judged else ""
        ours = series(mine.read, kind)
        figures.append(Figure(f"{text}: read of the disk", must, ours, Unit.BYTES, reached))
    for kind, text in _KINDS.items():
        ours, peer = series(mine.written, kind), series(theirs.written, kind)
        figures.append(Figure(f"{text}: takes on disk", "", ours, Unit.BYTES, None, peer))
    return Section(
        "backups",
        "Incremental backups",
        f"A running VM's disk of {_SIZE // GiB} GiB that holds {_DATA // GiB} GiB, of whose blocks "
        f"of {CHUNK // 1024} KiB every {_STEP}th is written anew by its guest. From sending the "
        "request to the API until the backup is there, durably, into a repository where each can "
        "be restored by itself, with checksums of everything. By hand QEMU's `drive-backup` with a "
        "dirty bitmap into qcow2 files, and `sync`; these have no checksums, and to restore one "
        "takes all before it.",
        figures,
        "QEMU by hand",
    )
