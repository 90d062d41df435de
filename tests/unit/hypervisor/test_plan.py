"""Plans as they are kept, and the small pure parts around them."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.unit.hypervisor.plans import from_disk, plan
from undercroft.hypervisor.emulator import parse_version
from undercroft.hypervisor.hosttsc import measure_tsc_khz
from undercroft.hypervisor.plan import decode_plan, encode_plan
from undercroft.hypervisor.state import RunState, needs
from undercroft.model.errors import UnsupportedError, WrongStateError


def test_plan_survives_being_written_down() -> None:
    for wanted in (plan(), from_disk(vmgenid=None, uid=5)):
        assert decode_plan(encode_plan(wanted)) == wanted


def test_plan_of_a_newer_version_is_read() -> None:
    extended = {**msgspec.json.decode(encode_plan(plan())), "new_thing": {"a": 1}}
    assert decode_plan(msgspec.json.encode(extended)) == plan()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"id": 5}', "\0"])
def test_damaged_plan(text: str) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_plan(text.encode())


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright", (10, 0, 2)),
        ("QEMU emulator version 7.2.17", (7, 2, 17)),
        ("QEMU emulator version 11.1", (11, 1, 0)),
    ],
)
def test_version(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


def test_no_version() -> None:
    with pytest.raises(UnsupportedError):
        parse_version("hello")


class Thing:
    name = "web1"
    run_state = RunState.PAUSED

    @needs(RunState.RUNNING, RunState.IO_ERROR)
    async def work(self, number: int) -> int:
        return number + 1


def test_guard_carries_both_states() -> None:
    thing = Thing()
    with pytest.raises(WrongStateError) as caught:
        asyncio.run(thing.work(1))
    assert caught.value.data == {"state": "paused", "needed": ["running", "io-error"]}
    thing.run_state = RunState.RUNNING
    assert asyncio.run(thing.work(1)) == 2


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("running", RunState.RUNNING),
        ("shutdown", RunState.SHUTDOWN),
        ("guest-panicked", RunState.PANICKED),
        ("io-error", RunState.IO_ERROR),
        ("prelaunch", RunState.PAUSED),
        ("postmigrate", RunState.PAUSED),
        ("something-new", RunState.PAUSED),
    ],
)
def test_run_states_of_qemu(status: str, state: RunState) -> None:
    assert RunState.from_qemu(status) is state


def test_counter_is_plausible_and_steady() -> None:
    first, second = measure_tsc_khz(), measure_tsc_khz()
    if first is None or second is None:
        pytest.skip("no time stamp counter here")
    assert 100_000 < first < 10_000_000
    assert abs(first - second) / first < 0.01
