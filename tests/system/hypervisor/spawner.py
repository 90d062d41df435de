"""Starts a machine in a process of its own, which can then be killed: ``PLAN [UID]``.

With a uid it becomes that user before. Prints the instance as JSON, then stays.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from undercroft.hypervisor.emulator import find_emulator
from undercroft.hypervisor.machine import QemuMachine
from undercroft.hypervisor.plan import decode_plan


async def main() -> None:
    """Starts what the file with the plan says."""
    plan = decode_plan(Path(sys.argv[1]).read_bytes())
    emulator = await find_emulator("x86_64")
    if len(sys.argv) > 2:
        await asyncio.to_thread(int)  # that user may be unable to read what is imported late
        os.setgroups([])
        os.setresgid(*[int(sys.argv[2])] * 3)
        os.setresuid(*[int(sys.argv[2])] * 3)
    machine = await QemuMachine.start(plan, emulator)
    print(msgspec.json.encode(machine.instance).decode(), flush=True)
    await machine.wait_exit()


asyncio.run(main())
