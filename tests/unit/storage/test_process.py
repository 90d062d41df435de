import asyncio
import os
import time
from pathlib import Path

import pytest

from undercroft.model.errors import MissingToolError, ProgramError, TimeLimitError
from undercroft.storage.process import Limits, run, share_of, tool


async def test_returns_stdout_and_feeds_stdin():
    assert await run(["cat"], stdin=b"through") == b"through"


async def test_failure_carries_exit_code_and_last_words():
    with pytest.raises(ProgramError, match="it broke") as caught:
        await run(["sh", "-c", "echo it broke >&2; exit 3"])
    assert caught.value.data["exit"] == 3


async def test_signal_is_told_apart():
    with pytest.raises(ProgramError, match="SIGKILL") as caught:
        await run(["sh", "-c", "kill -KILL $$"])
    assert caught.value.data["exit"] == -9


async def test_program_that_is_not_there():
    with pytest.raises(MissingToolError):
        await run(["no-such-program-here"])
    with pytest.raises(MissingToolError, match="no-such-program-here"):
        tool("no-such-program-here", package="nothing")


async def test_stderr_lines_are_reported_whole():
    lines: list[str] = []
    await run(["sh", "-c", "printf 'one\\ntw' >&2; printf 'o\\n' >&2"], on_line=lines.append)
    assert lines == ["one", "two"]


async def _gone(pid: int) -> bool:
    """Whether the process has ended (it may still be a zombie)."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        await asyncio.sleep(0.05)
    return False


@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_whole_group_ends_early(tmp_path: Path, how: str):
    pids = tmp_path / "pids"
    script = f"sleep 600 & echo $! > {pids}; echo $$ >> {pids}; wait"
    if how == "timeout":
        with pytest.raises(TimeLimitError):
            await run(["sh", "-c", script], timeout=0.5)
    else:
        task = asyncio.create_task(run(["sh", "-c", script]))
        while not pids.exists() or pids.read_text().count("\n") < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for pid in pids.read_text().split():
        assert await _gone(int(pid)), f"process {pid} was left behind"


async def test_child_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("undercroft.storage.process._GRACE", 0.2)
    started = time.monotonic()
    with pytest.raises(TimeLimitError):
        await run(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], timeout=0.3)
    assert time.monotonic() - started < 30


async def test_limits_apply():
    limits = Limits(memory=64 << 20, cpu=1)
    seen = (await run(["sh", "-c", "ulimit -v; ulimit -t"], limits=limits)).split()
    assert seen == [b"65536", b"1"]


async def test_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_OF_DAEMON", "1")
    assert b"SECRET_OF_DAEMON" not in await run(["env"])
    assert os.environ["SECRET_OF_DAEMON"] == "1"


def test_share_of_progress():
    seen: list[float] = []
    part = share_of(lambda fraction, phase: seen.append(fraction), 0.5, 1.0)
    for fraction in (0.0, 0.5, 2.0):
        part(fraction, "x")
    assert seen == [0.5, 0.75, 1.0]
