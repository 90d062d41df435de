"""Processes that are told apart from any other with their pid."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from undercroft.hypervisor.process import MARK, ExitStatus, Process, spawn


def run(tmp_path: Path, *argv: str) -> Process:
    with (tmp_path / "output").open("wb") as output:
        return spawn(
            argv, pass_fds=(), output=output.fileno(), directory=tmp_path, mark="/data/vms/x"
        )


async def test_a_frugal_one_has_small_pages_and_one_heap(tmp_path: Path) -> None:
    look = "grep THP_enabled /proc/self/status; echo $MALLOC_ARENA_MAX"
    for frugal, told in ((True, "THP_enabled:\t0\n1\n"), (False, "THP_enabled:\t1\n\n")):
        with (tmp_path / "output").open("wb") as output:
            process = spawn(
                ("sh", "-c", look),
                pass_fds=(),
                output=output.fileno(),
                directory=tmp_path,
                mark="/data/vms/x",
                frugal=frugal,
            )
        assert await process.wait() == ExitStatus(code=0)
        assert (tmp_path / "output").read_text() == told
    assert "THP_enabled:\t1\n" in Path("/proc/self/status").read_text()


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (("sh", "-c", "exit 0"), ExitStatus(code=0)),
        (("sh", "-c", "exit 7"), ExitStatus(code=7)),
        (("sh", "-c", "kill -9 $$"), ExitStatus(signal=9)),
    ],
)
async def test_how_a_child_ended(tmp_path: Path, argv: tuple[str, ...], status: ExitStatus) -> None:
    process = run(tmp_path, *argv)
    both = await asyncio.gather(process.wait(), process.wait())
    assert list(both) == [status, status]
    assert await process.wait() == status
    assert not process.alive


async def test_waiting_can_be_cancelled_alone(tmp_path: Path) -> None:
    process = run(tmp_path, "sleep", "1000")
    first, second = asyncio.create_task(process.wait()), asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    process.signal(signal.SIGTERM)
    assert await second == ExitStatus(signal=signal.SIGTERM)
    process.signal(signal.SIGKILL)  # to nobody


async def test_found_again_only_by_its_start_time(tmp_path: Path) -> None:
    process = run(tmp_path, "sleep", "1000")
    again = Process.open(process.pid, process.start_ticks)
    assert again is not None
    assert again.alive
    again.close()
    assert Process.open(process.pid, process.start_ticks + 1) is None
    assert Process.open(process.pid, process.start_ticks - 1) is None
    process.signal(signal.SIGKILL)
    await process.wait()
    assert Process.open(process.pid, process.start_ticks) is None


async def test_zombie_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    process = Process.open(child.pid)
    assert process is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.alive
    assert Process.open(child.pid) is None
    process.close()
    child.wait()


async def test_somebody_elses_child() -> None:
    """How it ended is read from its zombie, or from the kernel once it was reaped."""
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sh', '-c', 'read line; exit 5'], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True); sys.stdin.readline()\n"
        "child.stdin.close(); sys.stdin.readline(); child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    process = Process.open(int(parent.stdout.readline()))
    assert process is not None
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert await waiting == ExitStatus(code=5)
    parent.communicate("\n")


async def test_nothing_of_ours_is_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROFT_SECRET", "x")
    with (tmp_path / "open").open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        script = "env; ls /proc/self/fd | wc -l; umask; pwd; ps -o sid= -p $$ | tr -d ' '; echo $$"
        process = run(tmp_path, "sh", "-c", script)
        assert await process.wait() == ExitStatus(code=0)
    *environment, count, umask, directory, session, pid = (
        (tmp_path / "output").read_text().splitlines()
    )
    assert not [line for line in environment if "CROFT_SECRET" in line]
    assert f"{MARK}=/data/vms/x" in environment
    assert int(count) == 4  # the three streams, and the directory that ls reads
    assert umask == "0077"
    assert directory == str(tmp_path)
    assert session == pid


def test_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run(tmp_path, "/nowhere/program")


def test_measures(tmp_path: Path) -> None:
    process = Process.open(os.getpid())
    assert process is not None
    assert process.cpu_seconds() > 0
    assert process.memory() > 1 << 20
    process.close()
