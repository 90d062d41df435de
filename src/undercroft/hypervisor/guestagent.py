"""The guest agent (qemu-ga): programs, files and settings inside the guest.

Everything it says is the guest's word: bounded, checked, never trusted.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from undercroft.hypervisor.agentchannel import AgentChannel
from undercroft.model.errors import GuestAgentError, NoProgramError, TimeLimitError
from undercroft.model.requests import ExecResult

__all__ = ["GuestAgent"]

_TIMEOUT = 10.0
_FREEZE_TIMEOUT, _THAW_TIMEOUT = 60.0, 30.0
_CHUNK = 128 << 10
# qemu-ga keeps 16 MiB of each output stream, and sends them in base64.
_LARGEST_OUTPUT = 48 << 20
# Between two looks whether a program has ended: the guest's agent writes each into its log, so a
# tenth of the time that it has taken so far, within these bounds.
_POLL_FIRST, _POLL_MOST, _POLL_SHARE = 0.005, 2.0, 0.1
_NOT_STARTED = "Failed to execute child process"
_MOST_ADDRESSES = 64
_MOST_TRAFFIC = 2**63 - 1
# A given environment replaces the agent's own, so it has to bring what every program expects.
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

_T = TypeVar("_T")


class _Started(msgspec.Struct):
    pid: int


class _Status(msgspec.Struct):
    exited: bool
    exitcode: int | None = None
    signal: int | None = None
    out: str = msgspec.field(default="", name="out-data")
    err: str = msgspec.field(default="", name="err-data")
    out_cut: bool = msgspec.field(default=False, name="out-truncated")
    err_cut: bool = msgspec.field(default=False, name="err-truncated")


class _Read(msgspec.Struct):
    count: int
    data: str = msgspec.field(name="buf-b64")
    eof: bool


class _Written(msgspec.Struct):
    count: int


class _Address(msgspec.Struct):
    address: str = msgspec.field(name="ip-address")


class _Traffic(msgspec.Struct):
    received: int = msgspec.field(name="rx-bytes")
    sent: int = msgspec.field(name="tx-bytes")


class _Interface(msgspec.Struct):
    name: str
    addresses: list[_Address] = msgspec.field(default_factory=list, name="ip-addresses")
    statistics: _Traffic | None = None


class _HostName(msgspec.Struct):
    name: str = msgspec.field(name="host-name")


class GuestAgent:
    """Client of one guest's agent. One command at a time; connects when first needed.

    All methods raise `GuestAgentError` (absent, refused, nonsense) and `TimeLimitError`.
    """

    def __init__(self, name: str, path: Path) -> None:
        """For VM ``name``, through the socket at ``path``."""
        self.channel = AgentChannel(f"vm {name}", path)
        self._freezing = False
        self.traffic = (0, 0)
        """Bytes received and sent by the guest, as of the last `addresses`."""

    async def _call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        type: type[_T],
        *,
        timeout: float = _TIMEOUT,
        largest: int = 1 << 20,
    ) -> _T:
        answer = await self.channel.execute(command, arguments, timeout=timeout, largest=largest)
        try:
            return msgspec.convert(answer, type)
        except msgspec.ValidationError as error:
            raise self.channel.nonsense(command) from error

    def _bytes(self, command: str, text: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise self.channel.nonsense(command) from error

    async def ping(self, timeout: float = 2.0) -> bool:
        """Whether it answers within ``timeout`` seconds. Does not raise."""
        try:
            await self.channel.execute("guest-ping", timeout=timeout)
        except (GuestAgentError, TimeLimitError):
            return False
        return True

    async def host_name(self) -> str:
        """What the guest calls itself."""
        return (await self._call("guest-get-host-name", None, _HostName)).name[:256]

    async def exec(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        poll: float = _POLL_FIRST,
    ) -> ExecResult:
        """Runs a program and waits for its end. What runs longer than ``timeout`` seconds is
        killed, as far as the guest lets us. ``poll``: seconds between two looks at first."""
        if not argv or any("\0" in text for text in argv):
            raise GuestAgentError("a command needs a name, and no argument may hold a zero byte")
        arguments: dict[str, Any] = {
            "path": argv[0],
            "arg": list(argv[1:]),
            "capture-output": True,
        }
        if env:
            arguments["env"] = [f"{key}={value}" for key, value in {**_ENVIRONMENT, **env}.items()]
        if input is not None:
            arguments["input-data"] = base64.b64encode(input).decode()
        try:
            started = await self._call("guest-exec", arguments, _Started)
        except GuestAgentError as error:
            raise self._not_run(argv[0], error) from error
        try:
            async with asyncio.timeout(timeout):
                status = await self._wait(started.pid, poll)
        except TimeoutError as error:
            await self._kill(started.pid)
            raise TimeLimitError(
                f"{argv[0]} in {self.channel.name} did not end within {timeout:g} s",
                object=self.channel.name,
            ) from error
        except asyncio.CancelledError:
            await asyncio.shield(self._kill(started.pid))
            raise
        return ExecResult(
            exit_code=status.exitcode,
            signal=status.signal,
            stdout=self._bytes("guest-exec-status", status.out),
            stderr=self._bytes("guest-exec-status", status.err),
            truncated=status.out_cut or status.err_cut,
        )

    def _not_run(self, program: str, error: GuestAgentError) -> GuestAgentError:
        """Why a program was not started: the agent tells only in words."""
        _, found, why = error.message.partition(_NOT_STARTED)
        if not found:
            return error
        name = self.channel.name
        _, _, reason = why.rpartition("(")
        text = f"{program[:80]} in {name} cannot be run: {reason.removesuffix(')')}"
        if reason.startswith("No such file"):
            text = f"there is no program {program[:80]} in {name}"
        return NoProgramError(text, object=name, command="guest-exec")

    async def _wait(self, pid: int, poll: float) -> _Status:
        began = time.monotonic()
        while True:
            status = await self._call(
                "guest-exec-status", {"pid": pid}, _Status, largest=_LARGEST_OUTPUT
            )
            if status.exited:
                return status
            taken = time.monotonic() - began
            await asyncio.sleep(min(max(taken * _POLL_SHARE, poll), _POLL_MOST))

    async def _kill(self, pid: int) -> None:
        arguments = {"path": "kill", "arg": ["-KILL", str(pid)]}
        with contextlib.suppress(GuestAgentError, TimeLimitError):
            await self._call("guest-exec", arguments, _Started, timeout=2.0)

    async def read_file(self, path: str) -> AsyncIterator[bytes]:
        """The content of a file, in pieces."""
        handle = await self._call("guest-file-open", {"path": path, "mode": "rb"}, int)
        try:
            while True:
                read = await self._call(
                    "guest-file-read", {"handle": handle, "count": _CHUNK}, _Read
                )
                data = self._bytes("guest-file-read", read.data)
                if data:
                    yield data
                if read.eof or not data:
                    return
        finally:
            await self._close_file(handle)

    async def write_file(
        self, path: str, content: AsyncIterator[bytes], mode: int | None = None
    ) -> int:
        """Writes a file; its size in bytes. ``mode``: permissions."""
        handle = await self._call("guest-file-open", {"path": path, "mode": "wb"}, int)
        size = 0
        try:
            async for data in content:
                for start in range(0, len(data), _CHUNK):
                    size += await self._write(handle, data[start : start + _CHUNK])
        finally:
            await self._close_file(handle)
        if mode is not None:
            result = await self.exec(["chmod", f"{mode & 0o7777:o}", path], timeout=_TIMEOUT)
            if result.exit_code != 0:
                raise GuestAgentError(
                    f"{path} in {self.channel.name} was written, but its mode cannot be set: "
                    f"{result.stderr[:200].decode(errors='replace').strip()}",
                    object=self.channel.name,
                )
        return size

    async def _write(self, handle: int, data: bytes) -> int:
        total = len(data)
        while data:
            arguments = {"handle": handle, "buf-b64": base64.b64encode(data).decode()}
            written = await self._call("guest-file-write", arguments, _Written)
            if not 0 < written.count <= len(data):
                raise self.channel.nonsense("guest-file-write")
            data = data[written.count :]
        return total

    async def _close_file(self, handle: int) -> None:
        with contextlib.suppress(GuestAgentError, TimeLimitError):
            await self._call("guest-file-close", {"handle": handle}, dict)

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Asks the guest to power down; returns when asked, not when done."""
        # It does not answer this one; that it is there must be known before.
        await self.channel.execute("guest-ping", timeout=timeout)
        await self.channel.execute(
            "guest-shutdown", {"mode": "powerdown"}, timeout=timeout, answers=False
        )

    async def addresses(self, timeout: float = 5.0) -> tuple[str, ...]:
        """IP addresses of the guest, loopback and link-local left out."""
        interfaces = await self._call(
            "guest-network-get-interfaces", None, list[_Interface], timeout=timeout
        )
        found: list[str] = []
        self.traffic = _traffic(interfaces)
        for interface in interfaces:
            for entry in interface.addresses:
                try:
                    address = ipaddress.ip_address(entry.address)
                except ValueError as error:
                    raise self.channel.nonsense("guest-network-get-interfaces") from error
                if not (address.is_loopback or address.is_link_local):
                    found.append(str(address))
        return tuple(found[:_MOST_ADDRESSES])

    async def set_time(self) -> None:
        """Sets the guest's clock from the host's (after a resume)."""
        try:
            await self.channel.execute("guest-set-time", {"time": time.time_ns()}, timeout=_TIMEOUT)
        except GuestAgentError as error:
            # The system's clock is set; only writing it to the hardware clock failed.
            if "hwclock" not in error.message:
                raise

    async def freeze(self) -> int:
        """Freezes file systems; how many. To be followed by `thaw`, and soon."""
        self._freezing = True
        return await self._call("guest-fsfreeze-freeze", None, int, timeout=_FREEZE_TIMEOUT)

    async def thaw(self) -> int:
        """Thaws them; how many."""
        thawed = await self._call("guest-fsfreeze-thaw", None, int, timeout=_THAW_TIMEOUT)
        self._freezing = False
        return thawed

    async def frozen(self) -> bool:
        """Whether they are frozen."""
        return await self._call("guest-fsfreeze-status", None, str) == "frozen"

    async def thaw_forgotten(self) -> bool:
        """Thaws what an earlier daemon left frozen; whether there was any."""
        if self._freezing or not await self.frozen() or self._freezing:
            return False
        await self.thaw()
        return True

    async def close(self) -> None:
        """Hangs up."""
        await self.channel.close()


def _traffic(interfaces: list[_Interface]) -> tuple[int, int]:
    """Bytes received and sent, loopback left out; what a guest says is taken within 64 bits."""
    counted = [i.statistics for i in interfaces if i.name != "lo" and i.statistics is not None]
    received = sum(max(one.received, 0) for one in counted)
    sent = sum(max(one.sent, 0) for one in counted)
    return min(received, _MOST_TRAFFIC), min(sent, _MOST_TRAFFIC)
