"""Runs the probe guest (accelerator_guest.s) on an accelerator and tells how it went.

A run is bounded: QEMU has a time limit to start, the guest another from its first sign of life. It
never outlives the caller, not even one that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import cast

from undercroft.hypervisor.emulator import Emulator
from undercroft.model.base import Model

__all__ = [
    "STAGES", "GuestRun", "Outcome", "firmware", "guest_digest", "judge", "kvm_options",
    "last_words", "passed_stages", "run_guest", "takes_device",
]  # fmt: skip

STAGES = {
    "R": "real mode",
    "P": "protected mode",
    "L": "long mode with paging",
    "M": "CPUID and model-specific registers",
    "S": "SSE arithmetic",
    "F": "page faults and address spaces",
    "U": "ring 3 and system calls",
    "T": "timer interrupts",
    "W": "computing at speed",
}
"""The guest's stages in order: the letter it reports, and what it has then done."""

_TOKEN = "".join(STAGES) + "=undercroft-guest-ok\n"
_ROM_SIZE = 64 * 1024
_RESET_VECTOR = 0xFFF0
_JUMP_TO_START = b"\xea\x00\x00\x00\xf0"  # jmp far F000:0000
# isa-debug-exit turns the value v that the guest writes into the exit code 2v + 1.
_EXIT_PASSED = 0x2A * 2 + 1
_EXIT_EXCEPTION = 0x15 * 2 + 1
_EXIT_WRONG = 0x16 * 2 + 1
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_NOBODY = 65534
_KVM_GAVE_UP = (b"KVM internal error", b"KVM: entry failed", b"kvm run failed")
_LAST_WORDS = 0.1  # seconds
_KEEP = 16 * 1024  # bytes of what the guest and QEMU say


class Outcome(StrEnum):
    """How a run ended."""

    PASSED = "passed"
    HUNG = "hung"  # the guest lived, and did not finish in time
    SILENT = "silent"  # QEMU ran, but the guest never did anything in time
    INTERNAL_ERROR = "internal-error"  # KVM gave up on an instruction
    EXCEPTION = "exception"  # the guest met an exception that nothing had caused
    WRONG = "wrong"  # the guest found a wrong result
    RESET = "reset"  # the processor gave up (triple fault)
    FAILED = "failed"  # QEMU ended by itself
    NOT_STARTED = "not-started"  # there was no QEMU to run


class GuestRun(Model, frozen=True, kw_only=True):
    """One run of the probe guest.

    ``stages`` are the letters of `STAGES` that were passed; ``message`` what QEMU said last;
    ``seconds`` the time from the guest's first sign of life, ``total`` that from QEMU's start.
    """

    outcome: Outcome
    stages: str = ""
    exit_code: int | None = None
    message: str = ""
    seconds: float = 0.0
    total: float = 0.0


def firmware(code: bytes | None = None) -> bytes:
    """The guest as a 64 KiB firmware image (``code`` in place of the guest's own, for tests)."""
    if code is None:
        code = Path(__file__).with_name("accelerator_guest.bin").read_bytes()
    if len(code) > _RESET_VECTOR:
        raise ValueError("the guest does not fit below the reset vector")
    return (code.ljust(_RESET_VECTOR, b"\0") + _JUMP_TO_START).ljust(_ROM_SIZE, b"\0")


def guest_digest() -> str:
    """Identifies the guest: an answer got with another guest is worth nothing (SHA-256, hex)."""
    return hashlib.sha256(firmware()).hexdigest()


def takes_device(emulator: Emulator) -> bool:
    """Whether QEMU can be handed an open /dev/kvm (since 9.0)."""
    return emulator.version >= (9, 0, 0)


def kvm_options(emulator: Emulator, device: int | None) -> list[str]:
    """The options for KVM; ``device`` is an open descriptor of /dev/kvm that QEMU inherits.

    With it QEMU needs no right to the device of its own. A QEMU that cannot take it opens the
    device itself.
    """
    if device is None or not takes_device(emulator):
        return ["-accel", "kvm"]
    return ["-add-fd", f"fd={device},set=1", "-accel", "kvm,device=/dev/fdset/1"]


async def run_guest(
    emulator: Emulator,
    accelerator: str,
    *,
    device: int | None = None,
    start_limit: float = 15.0,
    run_limit: float = 3.0,
    rom: bytes | None = None,
) -> GuestRun:
    """Runs the probe guest once with ``accelerator`` (``kvm`` or ``tcg``). Never raises.

    ``device`` is as for `kvm_options`; the limits are in seconds; ``rom`` replaces the guest.
    As root, QEMU runs as nobody, with the group of /dev/kvm where the device cannot be handed over.
    """
    if accelerator == "kvm":
        options = [*kvm_options(emulator, device), "-cpu", "host"]
    else:
        options = ["-accel", accelerator, "-cpu", "max"]
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return GuestRun(
            outcome=Outcome.NOT_STARTED, message="the program setpriv (util-linux) is not installed"
        )
    began = time.monotonic()
    with _memory_file(firmware() if rom is None else rom) as rom_descriptor:
        handed = [] if device is None else [device]
        try:
            process = await asyncio.create_subprocess_exec(
                *_confined(setpriv, emulator, device),
                *_command(emulator.path, rom_descriptor, options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[rom_descriptor, *handed],
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            return GuestRun(outcome=Outcome.NOT_STARTED, message=error.strerror or str(error))
        run = _Run(process)
        hung = not await run.watch(start_limit, run_limit)
    return run.result(hung, time.monotonic() - began)


def _confined(setpriv: str, emulator: Emulator, device: int | None) -> list[str]:
    """What QEMU is started through: it dies with the caller (a hung guest must not go on for ever
    when the daemon is killed) and has no rights that it does not need."""
    command = [setpriv, "--pdeathsig", "KILL", "--no-new-privs"]
    if os.geteuid() == 0:
        command += ["--reuid", str(_NOBODY), "--regid", str(_NOBODY)]
        group = 0 if device is None else os.fstat(device).st_gid
        # Group 0 would be more than an unprivileged process may have.
        if takes_device(emulator) or group == 0:
            command.append("--clear-groups")
        else:
            command += ["--groups", str(group)]
    return [*command, "--"]


def _command(qemu: str, rom_descriptor: int, options: list[str]) -> list[str]:
    return [
        qemu,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", "q35", "-m", "16", "-bios", f"/proc/self/fd/{rom_descriptor}"),
        *("-chardev", "stdio,id=report,signal=off"),
        *("-device", "isa-debugcon,chardev=report,iobase=0xe9"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
        *("-sandbox", _SANDBOX),
        *options,
    ]


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("probe-guest")
    try:
        os.write(descriptor, data)
        yield descriptor
    finally:
        os.close(descriptor)


class _Run:
    """A started QEMU: what it says, and its end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        # A descriptor cannot come to mean another process, as a number can. None: ended already.
        self._handle: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(process.pid)
        self._output = bytearray()
        self._errors = bytearray()
        self._gave_up = False
        self._first_sign: float | None = None
        self._last_sign = 0.0

    async def watch(self, start_limit: float, run_limit: float) -> bool:
        """Waits for QEMU's end; False if it had to be killed because time was up."""
        try:
            async with asyncio.timeout(start_limit) as limit:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._read_output(limit, run_limit))
                    group.create_task(self._read_errors(limit))
                await self._process.wait()
        except TimeoutError:
            return False
        finally:
            await self._end()
        return True

    async def _read_output(self, limit: asyncio.Timeout, run_limit: float) -> None:
        stream = cast(asyncio.StreamReader, self._process.stdout)
        while data := await stream.read(_KEEP):
            self._last_sign = time.monotonic()
            if self._first_sign is None:
                self._first_sign = self._last_sign
                _allow(limit, run_limit)
            self._output += data[: _KEEP - len(self._output)]

    async def _read_errors(self, limit: asyncio.Timeout) -> None:
        stream = cast(asyncio.StreamReader, self._process.stderr)
        while data := await stream.read(_KEEP):
            self._errors += data[: _KEEP - len(self._errors)]
            if not self._gave_up and any(mark in self._errors for mark in _KVM_GAVE_UP):
                # QEMU would stay for ever, with a guest stopped for good. Let it say why.
                self._gave_up = True
                _allow(limit, _LAST_WORDS)

    def _kill(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    async def _end(self) -> None:
        self._kill()
        try:
            await asyncio.shield(self._process.wait())
        finally:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def result(self, hung: bool, total: float) -> GuestRun:
        output = self._output.decode("ascii", "replace")
        code = self._process.returncode
        if self._gave_up:
            outcome = Outcome.INTERNAL_ERROR
        elif hung:
            outcome = Outcome.SILENT if self._first_sign is None else Outcome.HUNG
        else:
            outcome = judge(output, code)
        return GuestRun(
            outcome=outcome,
            stages=passed_stages(output),
            exit_code=code,
            message=last_words(self._errors.decode(errors="replace")),
            seconds=0.0 if self._first_sign is None else self._last_sign - self._first_sign,
            total=total,
        )


def _allow(limit: asyncio.Timeout, seconds: float) -> None:
    """From now ``seconds`` more, or less, unless time is up already."""
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time() + seconds)


def judge(output: str, exit_code: int | None) -> Outcome:
    """How a run went that QEMU ended by itself: only the right words with the right exit code are
    a success."""
    if exit_code == _EXIT_PASSED and output == _TOKEN:
        return Outcome.PASSED
    if exit_code == _EXIT_EXCEPTION and "!" in output:
        return Outcome.EXCEPTION
    if exit_code in (_EXIT_PASSED, _EXIT_WRONG):
        return Outcome.WRONG
    return Outcome.RESET if exit_code == 0 else Outcome.FAILED


def passed_stages(output: str) -> str:
    """The stages that the guest reported, in their order and without a gap."""
    stages = ""
    for said, letter in zip(output, STAGES, strict=False):
        if said != letter:
            break
        stages += letter
    return stages


def last_words(errors: str) -> str:
    """What matters of QEMU's stderr: that KVM gave up and why, or the last error, or the last line
    (an assertion that failed comes after the error that explains it)."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    chosen = lines[-1:]
    for index, line in enumerate(lines):
        if any(mark.decode() in line for mark in _KVM_GAVE_UP):
            chosen = [line, *(text for text in lines[index:] if text == "emulation failure")]
            break
        if "error:" in line:
            chosen = [line]
    return "; ".join(chosen)[:300]
