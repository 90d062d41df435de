"""Starts a machine in a process of its own, which can then be killed: ``PLAN DIRECTORY``.

Prints the instance as JSON, then stays.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from undercroft.hypervisor.emulator import find_emulator
from undercroft.hypervisor.machine import QemuMachine
from undercroft.hypervisor.plan import decode_plan


async def main() -> None:
    """Starts what the file with the plan says."""
    plan = decode_plan(Path(sys.argv[1]).read_bytes())
    machine = await QemuMachine.start(plan, await find_emulator("x86_64"))
    print(msgspec.json.encode(machine.instance).decode(), flush=True)
    await machine.wait_exit()


asyncio.run(main())
