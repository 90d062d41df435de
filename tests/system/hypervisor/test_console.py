"""The console: complete, bounded, and harmless whatever a guest says."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from tests.system.hypervisor.lab import Guest, Lab, eventually, fill
from undercroft.hypervisor.console import CONSOLE_LOG, read_log
from undercroft.hypervisor.plan import LogLimits
from undercroft.storage.build.tiny import READY_LINE

FLOOD = "yes flooooooooooooooooooooooooooooood"


def log_size(guest: Guest) -> int:
    directory = Path(guest.machine.plan.directory)
    return sum(path.stat().st_size for path in directory.glob(CONSOLE_LOG + "*"))


async def test_everything_is_logged_from_the_first_byte(lab: Lab) -> None:
    guest = await lab.boot(kernel_arguments="console=ttyS0 earlyprintk=ttyS0")
    text = read_log(Path(guest.machine.plan.directory), 1 << 20)
    assert b"Linux version" in text[:2000]
    assert READY_LINE.encode() in text


async def test_sessions_see_the_same_and_both_type(lab: Lab) -> None:
    guest = await lab.boot()
    other = Guest(guest.machine, await guest.machine.console.attach(0))
    await guest.type("echo a''b")
    await other.until(b"ab\r\n")
    await other.type("echo c''d")
    await guest.until(b"cd\r\n")
    await other.session.close()
    assert await guest.run("echo on") == "on"


async def test_scrollback_is_this_runs(lab: Lab) -> None:
    first = await lab.boot()
    assert await first.run("echo a''ncient") == "ancient"
    plan = first.machine.plan
    await first.machine.kill()
    machine = await lab.start(plan)
    session = await machine.console.attach(65536)
    early = await asyncio.wait_for(anext(aiter(session)), 60)
    assert b"ancient" not in early
    assert b"ancient" in read_log(Path(plan.directory), 1 << 20)


async def test_flood_costs_little_and_the_log_stays_small(lab: Lab) -> None:
    limits = LogLimits(console=64 << 10)
    guest = await lab.boot(logs=limits)
    await guest.session.close()
    await guest.machine.console.write(FLOOD.encode() + b"\n")
    await eventually(lambda: log_size(guest) > limits.console // 2)
    before, start = time.process_time(), time.monotonic()
    await asyncio.sleep(3)
    share = (time.process_time() - before) / (time.monotonic() - start)
    assert share < 0.5  # of a core; unpaced it is all of it
    assert log_size(guest) <= limits.console
    session = await guest.machine.console.attach(100)
    assert await anext(aiter(session))
    report = await asyncio.wait_for(guest.machine.quit(), 30)
    assert report.hint == "quit"


async def test_session_that_does_not_read_holds_nobody_up(lab: Lab) -> None:
    guest = await lab.boot()
    slow = await guest.machine.console.attach(0)
    await guest.run(
        "i=0; while [ $i -lt 400 ]; do echo $i 0123456789012345678901234567890; "
        "i=$((i+1)); done | cat"
    )
    assert await guest.run("echo on") == "on"
    await slow.close()


async def test_guest_runs_on_when_nobody_reads(lab: Lab) -> None:
    """Also when the reader goes away in the middle of a flood."""
    guest = await lab.boot()
    machine = guest.machine
    assert machine.agent is not None
    await eventually(machine.agent.ping)
    await guest.type(FLOOD)
    await asyncio.sleep(0.5)
    await machine.console.close()
    for _ in range(3):
        result = await machine.agent.exec(["cat", "/proc/uptime"], timeout=60)
        assert result.exit_code == 0


async def test_input_that_the_guest_does_not_take_waits(lab: Lab) -> None:
    guest = await lab.boot()
    await guest.machine.pause()
    typing = asyncio.create_task(guest.session.write(b"x" * (4 << 20)))
    await asyncio.sleep(0.5)
    assert not typing.done()
    typing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await typing
    await guest.machine.resume()


async def test_full_disk_loses_output_and_says_so(lab: Lab, small_disk: Path) -> None:
    plan = msgspec.structs.replace(lab.plan(), directory=str(small_disk / "vm"))
    machine = await lab.start(plan)
    guest = Guest(machine, await machine.console.attach())
    await guest.ready()
    filler = fill(small_disk)
    await guest.run("i=0; while [ $i -lt 2000 ]; do echo l''ost $i; i=$((i+1)); done")
    await eventually(lambda: any(event.kind == "log-lost" for event in lab.events))
    filler.unlink()
    assert await guest.run("echo r''oom") == "room"
    await eventually(lambda: b"room" in read_log(small_disk / "vm", 4096))
    assert b"bytes of output lost: no space on the host" in read_log(small_disk / "vm", 1 << 20)
