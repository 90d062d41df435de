"""Taking hold of a QEMU that runs already, and letting go of one that did not come to be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

import msgspec

from undercroft.hypervisor import sockets
from undercroft.hypervisor.launch import Launch, clean_run_directory, open_output, read_plan
from undercroft.hypervisor.plan import MachinePlan
from undercroft.hypervisor.process import Process, boot_id
from undercroft.hypervisor.state import ExitReport
from undercroft.model.errors import QemuStartError, QmpError, UndercroftError
from undercroft.model.vm import Instance

__all__ = ["abandon", "start_error", "take_hold"]

Hold = tuple[MachinePlan, Process, socket.socket, socket.socket, int]


def take_hold(instance: Instance | None, run: Path) -> Hold | None:
    """The process that an instance means, if it is still that one, and the ends of its channels:
    plan, process, monitor, console, output. None if it has ended. Blocks.

    Raises:
        QmpError: it runs, but its channels cannot be reached.
    """
    process: Process | None = None
    with contextlib.ExitStack() as kept:
        try:
            if instance is not None:
                if instance.host_boot == boot_id():
                    process = Process.open(instance.pid, instance.start_ticks)
                if process is None:
                    return None
                kept.callback(process.close)
            plan = read_plan(run)
            connection = kept.enter_context(sockets.connect(run / "qmp.sock"))
            if process is None:
                process = Process.open(sockets.peer(connection)[0])
                if process is None:
                    return None
                kept.callback(process.close)
            serial = kept.enter_context(sockets.connect(run / "serial.sock"))
            output = open_output(run)
        except (OSError, msgspec.MsgspecError) as error:
            if process is None or not process.alive:
                return None
            raise QmpError(
                f"QEMU (process {process.pid}) runs, but cannot be taken over: {error}",
                pid=process.pid,
            ) from error
        kept.pop_all()
        return plan, process, connection, serial, output


def start_error(plan: MachinePlan, error: BaseException, report: ExitReport) -> Exception:
    """Why a start failed: QEMU's own words if it had any."""
    reason = report.message or (error.message if isinstance(error, UndercroftError) else str(error))
    if not reason:
        reason = f"signal {report.signal} ended it" if report.signal else "it ended"
    return QemuStartError(
        f"QEMU of vm {plan.name} did not start: {reason}",
        object=f"vm {plan.name}",
        action=_advice(reason),
        exit_code=report.code,
        signal=report.signal,
    )


def _advice(reason: str) -> str | None:
    if "host forwarding rule" in reason:
        return "choose another host port: this one is taken, or not allowed to this user"
    if "Cannot allocate memory" in reason or "cannot set up guest memory" in reason:
        return "give the VM less memory, or stop others"
    if "Failed to get" in reason and "lock" in reason:
        return "another process has the disk open: stop it first"
    return None


async def abandon(launched: Launch, plan: MachinePlan) -> None:
    """Ends a QEMU whose start was cancelled."""
    for process in (launched.process, *launched.helpers):
        process.signal(signal.SIGKILL)
    for connection in launched.connections.values():
        connection.close()
    os.close(launched.output)
    for process in (launched.process, *launched.helpers):
        await process.wait()
    await asyncio.to_thread(clean_run_directory, Path(plan.run_directory))
