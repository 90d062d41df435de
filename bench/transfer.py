"""VMs out and in as files, against qemu-img with the same disk."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.figures import Figure, Section, Unit, alternate
from bench.installation import Installation, installation
from bench.processes import run as program
from undercroft.model.units import GiB, MiB

_SIZE = 4 * GiB  # of the disk
_DATA = 1536 * MiB  # of what it holds: files of this system, as a guest's disk would
_PACKED = 384 * MiB  # the same where compression takes most of the time
_RATIO = 0.9
_STREAM = ("-O", "vmdk", "-o", "subformat=streamOptimized")
_OUT = {
    "ova": _STREAM,
    "qcow2": ("-O", "qcow2"),
    "raw": ("-O", "raw"),
    "vdi": ("-O", "vdi"),
}
_IN = {"ova": "vmdk", "qcow2": "qcow2", "raw": "raw", "vdi": "vdi", "vhdx": "vhdx"}


def run(directory: Path, runs: int) -> list[Section]:
    """Every format out, and in again."""
    with installation(directory / "transfer") as ours:
        ours.start_daemon()
        place = directory / "files"
        place.mkdir(mode=0o711)
        figures: list[Figure] = []
        for size, formats in ((_PACKED, ["ova"]), (_DATA, [f for f in _OUT if f != "ova"])):
            _fill(place / "disk.raw", size)
            ours.croft("import", str(place / "disk.raw"), "source", "--network", "none")
            figures += [_out(ours, place, format, runs) for format in formats]
            packed = "ova" in formats
            imported = formats if packed else [format for format in _IN if format != "ova"]
            figures += [_in(ours, place, format, runs) for format in imported]
            ours.croft("rm", "--force", "source")
    return [
        Section(
            "transfer",
            "In and out",
            f"A disk of {_SIZE // GiB} GiB that holds {_DATA // MiB} MiB of files of this system "
            f"(OVA: {_PACKED // MiB} MiB), "
            "from executing `croft export` or `croft import` to its exit: the file is there, "
            "durably, or the VM is. By hand `qemu-img convert` between the same formats, and "
            "`sync` of what it wrote, as ours is written durably. A throughput of 0.9 is a time of "
            "1.11.",
            figures,
            peer="qemu-img alone",
        )
    ]


def _fill(path: Path, left: int) -> None:
    """A disk with files in it, one after the other with gaps between, always the same ones."""
    at = MiB
    with path.open("wb") as disk:
        disk.truncate(_SIZE)
        for directory in ("/usr/bin", "/usr/lib", "/usr/share"):
            for parent, directories, names in os.walk(directory):
                directories.sort()
                for name in sorted(names):
                    file = Path(parent, name)
                    if left <= 0:
                        return
                    if file.is_symlink() or not file.is_file():
                        continue
                    data = file.read_bytes()[:left]
                    disk.seek(at)
                    disk.write(data)
                    left -= len(data)
                    at += -(-len(data) // 4096) * 4096 + (64 * 1024 if len(data) > MiB else 0)


def _layer(ours: Installation) -> Path:
    """The file that the source's disk is in."""
    with ours.client as client:
        head = client.volumes.get("source-boot").status.head
    return ours.data / "volumes" / f"{head}.qcow2"


def _out(ours: Installation, place: Path, format: str, runs: int) -> Figure:
    mine, theirs = place / f"out.{format}", place / f"peer.{format}"
    convert = ["qemu-img", "convert", "-f", "qcow2", *_OUT[format], str(_layer(ours)), str(theirs)]

    def export() -> None:
        program(ours.command("--quiet", "export", "source", str(mine)), timeout=600.0)

    def by_hand() -> None:
        program(convert, timeout=600.0)
        program(["sync", str(theirs)], timeout=600.0)

    def clean() -> None:
        mine.unlink(missing_ok=True)
        theirs.unlink(missing_ok=True)

    figure = _compare(f"export as {format}", export, by_hand, clean, runs)
    clean()
    return figure


def _in(ours: Installation, place: Path, format: str, runs: int) -> Figure:
    mine, theirs = place / f"disk.{format}", place / "peer.qcow2"
    source, kind = mine, _IN[format]
    if not mine.exists():
        ours.croft("export", "source", str(mine))
    if format == "ova":
        source = place / "disk.vmdk"
        if not source.exists():
            program(["tar", "-xf", str(mine), "-C", str(place)], timeout=600.0)
            (place / "disk-disk1.vmdk").rename(source)

    def bring() -> None:
        words = ("--quiet", "import", str(mine), "copy", "--network", "none")
        program(ours.command(*words), timeout=600.0)

    def by_hand() -> None:
        convert = ["qemu-img", "convert", "-f", kind, "-O", "qcow2", str(source), str(theirs)]
        program(convert, timeout=600.0)
        program(["sync", str(theirs)], timeout=600.0)

    def clean() -> None:
        theirs.unlink(missing_ok=True)
        subprocess.run(ours.command("--quiet", "rm", "--force", "copy"), capture_output=True)

    figure = _compare(f"import of {format}", bring, by_hand, clean, runs)
    clean()
    return figure


def _compare(
    what: str,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    clean: Callable[[], None],
    runs: int,
) -> Figure:
    def timed(action: Callable[[], None]) -> Callable[[], float]:
        def measure() -> float:
            clean()
            os.sync()  # nobody pays for what was written before
            began = time.perf_counter()
            action()
            return time.perf_counter() - began

        return measure

    found = alternate(runs, {"ours": timed(ours), "peer": timed(theirs)})
    ratio = found["peer"].median / found["ours"].median
    must = f"≥ {_RATIO} of the throughput"
    return Figure(what, must, found["ours"], Unit.SECONDS, ratio >= _RATIO, found["peer"])
