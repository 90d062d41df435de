"""QEMU's own output: never blocks it, never grows, never lost by our death."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from undercroft.hypervisor.launch import OUTPUT_FIFO, open_output
from undercroft.hypervisor.output import QEMU_LOG, OutputLog

STAMP = "2026-01-01T00:00:00.000000Z qemu-system-x86_64: "


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[int]:
    """The end that QEMU has."""
    os.mkfifo(tmp_path / OUTPUT_FIFO)
    descriptor = os.open(tmp_path / OUTPUT_FIFO, os.O_RDWR | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def follow(tmp_path: Path, limit: int = 1 << 16) -> OutputLog:
    return OutputLog(open_output(tmp_path), tmp_path, limit)


async def until(log: OutputLog, words: str) -> None:
    async with asyncio.timeout(20):
        while words not in log.last_words:
            await asyncio.sleep(0.01)


async def test_last_words_without_what_is_always_said(tmp_path: Path, writer: int) -> None:
    log = follow(tmp_path)
    waiting = "-chardev socket: info: QEMU waiting for connection on: x"
    os.write(writer, f"{STAMP}{waiting}\n{STAMP}cannot do it: really\nplain".encode())
    await until(log, "plain")
    assert log.last_words == "cannot do it: really\nplain"
    log.finish()
    assert (tmp_path / QEMU_LOG).read_text().count("\n") == 2


async def test_said_while_nobody_listened(tmp_path: Path, writer: int) -> None:
    first = follow(tmp_path)
    first.close()
    os.write(writer, b"alone\n")
    second = follow(tmp_path)
    await until(second, "alone")
    second.close()


async def test_flood_neither_blocks_nor_grows(tmp_path: Path, writer: int) -> None:
    log = follow(tmp_path, limit=16 << 10)
    dropped = 0
    for number in range(200):
        try:
            os.write(writer, f"{number} {'x' * 2000}\n".encode())
        except BlockingIOError:
            dropped += 1
        if number % 20 == 0:
            await asyncio.sleep(0.02)
    assert dropped  # at once, instead of waiting for us
    log.finish()
    assert sum(path.stat().st_size for path in tmp_path.glob(QEMU_LOG + "*")) <= 16 << 10
    assert all(len(line) <= 500 for line in log.last_words.splitlines())


async def test_rest_is_taken_at_the_end(tmp_path: Path, writer: int) -> None:
    log = follow(tmp_path)
    os.write(writer, b"one\n")
    await until(log, "one")
    os.write(writer, b"two\n")  # while it pauses
    log.finish()
    assert log.last_words == "one\ntwo"
    log.finish()  # again is no harm
