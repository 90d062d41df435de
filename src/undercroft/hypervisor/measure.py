"""What a machine has used so far."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from undercroft.hypervisor.process import Process
from undercroft.hypervisor.qmp import Monitor
from undercroft.hypervisor.state import MachineStats
from undercroft.model.errors import QmpError

__all__ = ["measure"]

_TIMEOUT = 5.0


async def measure(monitor: Monitor, process: Process, *, balloon: bool) -> MachineStats:
    """Reads the counters.

    Raises:
        QmpError, TimeLimitError: QEMU does not answer.
    """
    blocks: list[dict[str, Any]] = await monitor.execute("query-blockstats", timeout=_TIMEOUT)
    guest_memory: int | None = None
    if balloon:
        with contextlib.suppress(QmpError):  # the guest has not set it up yet
            guest_memory = (await monitor.execute("query-balloon", timeout=_TIMEOUT))["actual"]
    memory = await asyncio.to_thread(process.memory)
    # Devices only: firmware flash and the nodes beneath count elsewhere.
    counters = [block["stats"] for block in blocks if "disk" in block.get("qdev", "")]
    return MachineStats(
        cpu_seconds=process.cpu_seconds(),
        memory=memory,
        guest_memory=guest_memory,
        disk_read_bytes=sum(entry["rd_bytes"] for entry in counters),
        disk_write_bytes=sum(entry["wr_bytes"] for entry in counters),
        disk_reads=sum(entry["rd_operations"] for entry in counters),
        disk_writes=sum(entry["wr_operations"] for entry in counters),
    )
