"""``script/bench``: runs benchmarks and writes the report."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import backups, clones, cycle, disks, hundred, inside, known, start, transfer
from bench.figures import Section
from bench.processes import adopt_orphans, end_children, terminate_is_interrupt
from bench.report import QUIET, busy_share, conditions, render, text

_REPORT = Path(__file__).parent.parent / "docs/benchmarks.md"


@dataclass(frozen=True)
class Benchmark:
    """One of them: what it is called and does, and how often it measures (else, with --quick)."""

    summary: str
    run: Callable[[Path, int], list[Section]]
    runs: int
    quick: int


BENCHMARKS = {
    "start": Benchmark("start of a tiny VM, against QEMU by hand and libvirt", start.run, 9, 3),
    "known": Benchmark("lists and memory with 1,000 VMs, against libvirt", known.run, 21, 5),
    "api": Benchmark("the API on one core", inside.api, 3, 1),
    "store": Benchmark("the store, against the same SQL by hand", inside.store, 3, 1),
    "cycle": Benchmark("20 tiny VMs at once: whose processor time it takes", cycle.run, 2, 1),
    "clones": Benchmark("instant clones of a tiny VM, against its boot", clones.tiny, 7, 3),
    "debian": Benchmark("the same of debian:12, and warm starts", clones.debian, 3, 1),
    "hundred": Benchmark("100 instant clones at once: time and memory", hundred.run, 3, 1),
    "disks": Benchmark("linked clones and live snapshots, against QEMU by hand", disks.run, 9, 3),
    "backups": Benchmark("full and incremental backups, against QEMU", backups.run, 3, 1),
    "transfer": Benchmark("export and import, against qemu-img", transfer.run, 5, 1),
}


def main() -> int:
    """Runs what was asked for; returns the exit code (1: a figure was missed)."""
    args = _parse()
    names = args.names or list(BENCHMARKS)
    adopt_orphans()
    directory = Path(tempfile.mkdtemp(prefix="croft-bench-"))
    directory.chmod(0o711)  # QEMU's unprivileged user shall get through
    sections: list[Section] = []
    try:
        with terminate_is_interrupt():
            busy = _wait_quiet(args.wait_quiet)
            for name in names:
                benchmark = BENCHMARKS[name]
                runs = benchmark.quick if args.quick else benchmark.runs
                _tell(f"{name}: {benchmark.summary} ({runs} runs)")
                for section in benchmark.run(directory, runs):
                    print(text(section), end="\n\n", flush=True)
                    sections.append(section)
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    finally:
        end_children()
        shutil.rmtree(directory, ignore_errors=True)
    target = args.output
    if target is None and not args.names and not args.quick:
        target = _REPORT
    if target is not None:
        target.write_text(render(sections, conditions(busy)))
        _tell(f"written to {target}")
    figures = [figure for section in sections for figure in section.figures]
    return 1 if any(figure.reached is False for figure in figures) else 0


def _parse() -> argparse.Namespace:
    known_names = "\n".join(f"  {name:8} {b.summary}" for name, b in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="script/bench",
        description="Measures Undercroft's figures beside their peers. A full run writes "
        "docs/benchmarks.md.",
        epilog=f"benchmarks:\n{known_names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; writes nothing")
    parser.add_argument("--quick", action="store_true", help="fewer runs; writes nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument(
        "--wait-quiet",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait this long for the machine to have nothing else to do",
    )
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in BENCHMARKS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    return args


def _wait_quiet(limit: float) -> float:
    """Waits until others use little of the processors; how much they use now."""
    deadline = time.monotonic() + limit
    while (busy := busy_share()) > QUIET and time.monotonic() < deadline:
        pass
    if busy > QUIET:
        _tell(f"warning: {busy * 100:.0f} % of the processors are busy with other things")
    return busy


def _tell(line: str) -> None:
    print(f"==> {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
