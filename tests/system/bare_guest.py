"""A QEMU started by hand: to try images without the rest of Undercroft."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

AGENT = "org.qemu.guest_agent.0"


class BareGuest:
    """A running guest: its serial console, and its agent."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self.process = process
        self.output = b""
        self._directory = directory
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def wait_for(self, text: str, timeout: float = 120) -> None:
        """Waits until the console has shown the text, which is then taken off the output."""
        wanted = text.encode()
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(timeout):
                while wanted not in self.output:
                    data = await self.process.stdout.read(65536)
                    assert data, f"QEMU ended; it said {self.output.decode(errors='replace')}"
                    self.output += data
        except TimeoutError:
            raise AssertionError(
                f"no {text!r} on the console within {timeout} s, but "
                f"{self.output[-3000:].decode(errors='replace')}"
            ) from None
        self.output = self.output.partition(wanted)[2]

    def type(self, text: str) -> None:
        """Types on the serial console."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    async def agent(self, command: str, **arguments: Any) -> Any:
        """Asks the guest agent, waiting until it answers."""
        async with asyncio.timeout(120):
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_unix_connection(
                    self._directory / "agent"
                )
                while await self._ask("guest-sync", {"id": 4711}, patience=1) != 4711:
                    pass
            return await self._ask(command, arguments)

    async def _ask(self, command: str, arguments: dict[str, Any], patience: float = 120) -> Any:
        assert self._reader is not None
        assert self._writer is not None
        request = {"execute": command, "arguments": arguments}
        self._writer.write(json.dumps(request).encode() + b"\n")
        try:
            async with asyncio.timeout(patience):
                while True:
                    reply = json.loads(await self._reader.readline())
                    # Late answers to earlier attempts to say hello.
                    if reply.get("return") == 4711 and command != "guest-sync":
                        continue
                    assert "return" in reply, reply
                    return reply["return"]
        except TimeoutError:
            if command != "guest-sync":
                raise
            return None

    async def execute(self, *argv: str) -> tuple[int, str]:
        """Runs a program through the agent: its exit code, and all that it wrote."""
        options: dict[str, Any] = {"path": argv[0], "arg": argv[1:], "capture-output": True}
        pid = (await self.agent("guest-exec", **options))["pid"]
        while True:
            status = await self.agent("guest-exec-status", pid=pid)
            if status["exited"]:
                text = base64.b64decode(status.get("out-data", "") + "")
                text += base64.b64decode(status.get("err-data", ""))
                return status.get("exitcode", -1), text.decode(errors="replace")
            await asyncio.sleep(0.1)

    def tell_agent(self, command: str) -> None:
        """Sends the agent a command that has no answer."""
        assert self._writer is not None
        self._writer.write(json.dumps({"execute": command}).encode() + b"\n")

    async def wait_off(self, timeout: float = 60) -> int | None:
        """Waits until the guest has switched itself off; QEMU's exit code."""
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout):
            while data := await self.process.stdout.read(65536):
                self.output += data
            return await self.process.wait()

    async def monitor(self, command: str) -> list[dict[str, Any]]:
        """Runs one QMP command; what came back, with the events in between."""
        reader, writer = await asyncio.open_unix_connection(self._directory / "qmp")
        try:
            writer.write(b'{"execute": "qmp_capabilities"}\n')
            writer.write(json.dumps({"execute": command}).encode() + b"\n")
            return [json.loads(await reader.readline()) for _ in range(3)]
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def bare_guest(
    directory: Path, *options: str, machine: str = "q35", memory: int = 256, cpus: int = 1
) -> AsyncIterator[BareGuest]:
    """A guest under TCG with an agent port and a restricted network; killed at the end."""
    bus = "device" if machine.startswith("microvm") else "pci"
    process = await asyncio.create_subprocess_exec(
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot",
        "-M", machine, "-accel", "tcg", "-cpu", "max", "-m", str(memory), "-smp", str(cpus),
        "-display", "none", "-serial", "stdio",
        "-qmp", "unix:qmp,server=on,wait=off",
        "-device", f"virtio-serial-{bus}",
        "-chardev", "socket,path=agent,server=on,wait=off,id=agent",
        "-device", f"virtserialport,chardev=agent,name={AGENT}",
        "-netdev", "user,id=net,restrict=on", "-device", f"virtio-net-{bus},netdev=net",
        *options,
        cwd=directory,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    guest = BareGuest(process, directory)
    try:
        yield guest
    finally:
        if guest._writer is not None:
            guest._writer.close()
        if process.returncode is None:
            process.kill()
        await process.wait()
