"""Real machines for tests: plans with everything below a temporary directory, guests to talk to,
and nothing left running at the end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from undercroft.hypervisor.console import ConsoleSession
from undercroft.hypervisor.emulator import Emulator, find_emulator
from undercroft.hypervisor.machine import ExitReport, MachineEvent, QemuMachine, RunState
from undercroft.hypervisor.plan import DiskFormat, MachinePlan, PlanDisk
from undercroft.model.vm import Firmware
from undercroft.storage.build.tiny import READY_LINE

BOOT_LIMIT = 120.0  # seconds; a guard, not a measurement


class Guest:
    """A machine that runs `tiny`, and a session on its console."""

    def __init__(self, machine: QemuMachine, session: ConsoleSession) -> None:
        self.machine = machine
        self.session = session
        self._output = aiter(session)
        self._seen = b""
        self._numbers = itertools.count(1)

    async def ended(self) -> ExitReport:
        """Waits for the end of the machine."""
        async with asyncio.timeout(BOOT_LIMIT):
            return await self.machine.wait_exit()

    async def until(self, text: bytes) -> bytes:
        """Reads the console until ``text`` appears; everything up to its end."""
        async with asyncio.timeout(BOOT_LIMIT):
            while text not in self._seen:
                self._seen += await anext(self._output)
        head, _, self._seen = self._seen.partition(text)
        return head + text

    async def ready(self) -> None:
        """Waits for userspace and a shell on the console."""
        await self.until(READY_LINE.encode())
        await self.until(b"# ")

    async def settled(self) -> None:
        """Waits for what `tiny` starts after the shell: drivers, and who hears the button."""
        await self.run("while ! [ -e /run/acpid.pid ]; do sleep 0.1; done")

    async def run(self, command: str) -> str:
        """Types a command; what it prints."""
        mark = f"done-{next(self._numbers)}"
        # The mark is not in what the terminal echoes, only in what the shell makes of it.
        await self.session.write(f"{command}; echo {mark[0]}''{mark[1:]}\n".encode())
        await self.until(b"\n")
        output = (await self.until(mark.encode())).decode(errors="replace").removesuffix(mark)
        await self.until(b"# ")
        return output.strip()

    async def type(self, command: str) -> None:
        """Types a command and leaves it at that."""
        await self.session.write(command.encode() + b"\n")


class Lab:
    """Makes machines below ``base``, and ends what is left of them."""

    def __init__(self, base: Path, image: Path, emulator: Emulator) -> None:
        self.base = base
        self.image = image
        self.emulator = emulator
        self.events: list[MachineEvent] = []
        self._machines: list[QemuMachine] = []

    @classmethod
    async def open(cls, base: Path, image: Path) -> Lab:
        """With this host's QEMU for x86-64."""
        return cls(base, image, await find_emulator("x86_64"))

    def plan(self, **changes: Any) -> MachinePlan:
        """A plan that boots `tiny` directly; a VM of its own each time."""
        number = str(uuid.uuid4())
        values: dict[str, Any] = {
            "id": number,
            "name": f"t{number[:4]}",
            "uuid": number,
            "directory": str(self.base / "vms" / number),
            "run_directory": str(self.base / "run" / "vms" / number),
            "firmware": Firmware.KERNEL,
            "kernel": str(self.image / "kernel"),
            "initrd": str(self.image / "initrd"),
            "kernel_arguments": "console=ttyS0 quiet",
            "memory": 192 << 20,
        }
        return MachinePlan(**{**values, **changes})

    async def start(self, plan: MachinePlan | None = None, **changes: Any) -> QemuMachine:
        """Starts a machine."""
        plan = plan or self.plan(**changes)
        return self.keep(await QemuMachine.start(plan, self.emulator, on_event=self.events.append))

    def keep(self, machine: QemuMachine) -> QemuMachine:
        """Sees to a machine's end."""
        self._machines.append(machine)
        return machine

    async def adopt(self, machine: QemuMachine) -> QemuMachine:
        """Takes over a machine as the next daemon would."""
        plan = machine.plan
        again = await QemuMachine.adopt(
            machine.instance, Path(plan.run_directory), Path(plan.directory)
        )
        assert again is not None
        return self.keep(again)

    async def back_at(self, machine: QemuMachine) -> Guest:
        """The shell of a guest that was left there."""
        guest = Guest(machine, await machine.console.attach(0))
        await guest.type("")
        await guest.until(b"# ")
        return guest

    async def boot(self, **changes: Any) -> Guest:
        """Starts a machine and waits for its shell."""
        machine = await self.start(**changes)
        guest = Guest(machine, await machine.console.attach())
        await guest.ready()
        return guest

    def disk(self, name: str, size: int, **changes: Any) -> PlanDisk:
        """A new empty qcow2 disk."""
        path = self.base / name
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
        return PlanDisk(path=str(path), format=DiskFormat.QCOW2, **changes)

    async def close(self) -> None:
        """Kills what still runs."""
        for machine in self._machines:
            if machine.run_state is not RunState.ENDED:
                with contextlib.suppress(Exception):
                    await machine.kill()

    def left_behind(self) -> list[Path]:
        """Files of runs."""
        return [path for path in (self.base / "run" / "vms").rglob("*") if path.is_file()]


async def eventually(check: Callable[[], bool | Awaitable[bool]], limit: float = 60.0) -> None:
    """Waits until ``check`` holds."""
    async with asyncio.timeout(limit):
        while True:
            result = check()
            if isinstance(result, bool):
                if result:
                    return
            elif await result:
                return
            await asyncio.sleep(0.02)


def fill(directory: Path) -> Path:
    """Leaves no space on the file system; the file that holds it."""
    path = directory / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return path


def open_descriptors() -> dict[str, str]:
    """What this process has open."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def processes_mentioning(text: str) -> list[int]:
    """Pids of living processes with ``text`` among their arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found
