"""The probe guest, and guests that misbehave, in a real QEMU."""

import asyncio
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
import uvloop

from undercroft.hypervisor.accelerator_guest import (
    STAGES,
    GuestRun,
    Outcome,
    firmware,
    run_guest,
)
from undercroft.hypervisor.emulator import Emulator, find_emulator

ALL = "".join(STAGES)
HALT = b"\xf4"  # interrupts are off at reset: this is for ever
LOOP = b"\xeb\xfe"
LIMIT = 30.0  # seconds: a guard, for whatever should happen soon


def say(text: str, *, exit_value: int | None = None) -> bytes:
    """Real-mode code that writes ``text`` to the debug console, then ends QEMU."""
    code = b"".join(b"\xb0" + bytes([char]) + b"\xe6\xe9" for char in text.encode())
    return code if exit_value is None else code + b"\xb0" + bytes([exit_value]) + b"\xe6\xf4"


@pytest.fixture
async def qemu() -> Emulator:
    return await find_emulator("x86_64")


_others: set[int] = set()  # that were there before, and are somebody else's


@pytest.fixture(autouse=True, scope="module")
def others() -> None:
    _others.update(children())


def children() -> set[int]:
    """The processes that a test of this file has started and not yet reaped."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        found.update(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
    return found - _others


def test_the_work_comes_to_what_the_guest_expects() -> None:
    source = files("undercroft.hypervisor").joinpath("accelerator_guest.s").read_text()

    def constant(name: str) -> int:
        found = re.search(rf"\.set {name}, (\w+)", source)
        assert found is not None
        return int(found[1], 0)

    mask = (1 << 64) - 1
    arena = bytearray(8192)
    value, result = 1, 0
    for left in range(constant("WORK"), 0, -1):
        value = (value * 6364136223846793005 + 1442695) & mask
        at = value >> 52
        word = int.from_bytes(arena[at : at + 8], "little") ^ value
        arena[at : at + 8] = word.to_bytes(8, "little")
        result = (result + word) & mask
        result = ((result << 7 | result >> 57) & mask) ^ at
        if result & 1:
            result = (result + left) & mask
    assert result == constant("WORK_RESULT")


async def test_the_guest_passes_under_tcg_every_time(qemu: Emulator) -> None:
    for _ in range(5):
        run = await run_guest(qemu, "tcg", run_limit=LIMIT)
        assert (run.outcome, run.stages, run.exit_code) == (Outcome.PASSED, ALL, 85), run
        assert 0 < run.seconds <= run.total
    assert not children()


def test_it_runs_on_the_loop_of_the_daemon() -> None:
    async def once() -> GuestRun:
        return await run_guest(await find_emulator("x86_64"), "tcg", run_limit=LIMIT)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(once()).outcome is Outcome.PASSED


@pytest.mark.parametrize(
    ("code", "outcome", "stages"),
    [
        (say("RPLM?", exit_value=0x16), Outcome.WRONG, "RPLM"),
        (say("RPL!0d", exit_value=0x15), Outcome.EXCEPTION, "RPL"),
        (say("RP=undercroft-guest-ok\n", exit_value=0x2A), Outcome.WRONG, "RP"),
        (say(ALL + "=undercroft-guest-ok\n", exit_value=0x16), Outcome.WRONG, ALL),
        (say(ALL, exit_value=0x2A), Outcome.WRONG, ALL),
        (say("RP", exit_value=0x01), Outcome.FAILED, "RP"),
        # An empty interrupt table and a breakpoint: three faults in a row.
        (say("RP") + b"\x0f\x01\x1e\x00\x10\xcc", Outcome.RESET, "RP"),
    ],
)
async def test_a_guest_that_ends_badly(
    qemu: Emulator, code: bytes, outcome: Outcome, stages: str
) -> None:
    run = await run_guest(qemu, "tcg", rom=firmware(code), run_limit=LIMIT)
    assert (run.outcome, run.stages) == (outcome, stages), run
    assert not children()


@pytest.mark.parametrize("end", [HALT, LOOP])
async def test_a_guest_that_hangs_is_killed(qemu: Emulator, end: bytes) -> None:
    run = await run_guest(qemu, "tcg", rom=firmware(say("RPL") + end), run_limit=0.5)
    assert (run.outcome, run.stages, run.exit_code) == (Outcome.HUNG, "RPL", -signal.SIGKILL), run
    assert not children()


async def test_a_guest_that_never_lives_is_killed(qemu: Emulator) -> None:
    run = await run_guest(qemu, "tcg", rom=firmware(HALT), start_limit=0.5)
    assert (run.outcome, run.stages, run.exit_code) == (Outcome.SILENT, "", -signal.SIGKILL), run
    assert not children()


async def test_a_guest_that_floods_is_bounded(qemu: Emulator) -> None:
    flood = b"\xb0\x52\xe6\xe9" + b"\xeb\xfc"  # 'R' for ever
    run = await run_guest(qemu, "tcg", rom=firmware(flood), run_limit=0.5)
    assert (run.outcome, run.stages) == (Outcome.HUNG, "R")


async def test_qemu_says_why_it_will_not(qemu: Emulator) -> None:
    run = await run_guest(qemu, "nonsense")
    assert run.outcome is Outcome.FAILED
    assert "nonsense" in run.message


async def test_no_qemu(tmp_path: Path) -> None:
    run = await run_guest(
        Emulator(arch="x86_64", path=str(tmp_path / "qemu"), version=(10, 0, 0)), "tcg"
    )
    # setpriv is what starts, and what says that there is nothing to run.
    assert run.outcome is Outcome.FAILED
    assert "No such file" in run.message


async def test_no_setpriv(qemu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = await run_guest(qemu, "tcg")
    assert run.outcome is Outcome.NOT_STARTED
    assert "setpriv" in run.message


async def started() -> int:
    """Waits for the one QEMU of this process to be itself (no longer setpriv)."""
    async with asyncio.timeout(LIMIT):
        while True:
            for pid in children():
                name = Path(f"/proc/{pid}/comm").read_text()
                if name.startswith("qemu-system"):
                    return pid
            await asyncio.sleep(0.01)


async def test_cancelling_leaves_nothing_behind(qemu: Emulator) -> None:
    task = asyncio.create_task(run_guest(qemu, "tcg", rom=firmware(say("R") + HALT), run_limit=60))
    await started()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not children()


@pytest.mark.parametrize("steps", range(8))
async def test_cancelling_at_any_point_leaves_nothing_behind(qemu: Emulator, steps: int) -> None:
    task = asyncio.create_task(run_guest(qemu, "tcg", rom=firmware(HALT), start_limit=60))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # What was only just being started is ended, and reaped, by the event loop.
    async with asyncio.timeout(LIMIT):
        while children():
            await asyncio.sleep(0.01)


async def test_qemu_is_confined(qemu: Emulator) -> None:
    task = asyncio.create_task(run_guest(qemu, "tcg", rom=firmware(say("R") + HALT), run_limit=60))
    try:
        pid = await started()
        async with asyncio.timeout(LIMIT):
            while True:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
                if status["Seccomp"] == "2":
                    break
                await asyncio.sleep(0.01)
        assert status["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            assert status["Uid"].split() == ["65534"] * 4
            assert status["Gid"].split() == ["65534"] * 4
            assert status["Groups"].split() == []
            assert int(status["CapEff"], 16) == 0
    finally:
        task.cancel()
        await asyncio.wait([task])


HOLDER = """
import asyncio
from undercroft.hypervisor.accelerator_guest import firmware, run_guest
from undercroft.hypervisor.emulator import find_emulator

async def main():
    rom = firmware(bytes.fromhex("b052e6e9f4"))  # says R, then halts for ever
    await run_guest(await find_emulator("x86_64"), "tcg", rom=rom, run_limit=600)

asyncio.run(main())
"""


def test_qemu_dies_with_a_daemon_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as holder:
        try:
            qemu = asyncio.run(grandchild(holder.pid))
            handle = os.pidfd_open(qemu)
            try:
                assert not select.select([handle], [], [], 0)[0]
                holder.kill()
                holder.wait()
                assert select.select([handle], [], [], LIMIT)[0], "QEMU goes on"
            finally:
                os.close(handle)
        finally:
            holder.kill()


async def grandchild(pid: int) -> int:
    async with asyncio.timeout(LIMIT):
        while True:
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if Path(f"/proc/{child}/comm").read_text().startswith("qemu-system"):
                    return int(child)
            await asyncio.sleep(0.01)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm")
async def test_a_kvm_that_interprets_is_caught(qemu: Emulator) -> None:
    """KVM without VMX or SVM (a PVM) cannot run an unmodified 64-bit guest."""
    if any(Path(f"/sys/module/{name}").exists() for name in ("kvm_intel", "kvm_amd")):
        pytest.skip("KVM has hardware here")
    began = time.monotonic()
    device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        run = await run_guest(qemu, "kvm", device=device, run_limit=3)
    finally:
        os.close(device)
    assert run.outcome is not Outcome.PASSED, run
    assert time.monotonic() - began < LIMIT
    assert not children()
