"""Getting QEMU to run: opens what it is handed, prepares its sockets, spawns it.

All blocking; `launch` is called in a thread. Either everything is there when it returns, or
nothing is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path

from undercroft.hypervisor import sockets
from undercroft.hypervisor.board import kvm_group, nvram_path
from undercroft.hypervisor.commandline import CommandLine
from undercroft.hypervisor.firmware import FirmwareFiles
from undercroft.hypervisor.line import Handle, HandleKind
from undercroft.hypervisor.medium import open_medium
from undercroft.hypervisor.plan import MachinePlan, decode_plan, encode_plan
from undercroft.hypervisor.process import Process, spawn
from undercroft.hypervisor.secret import open_secret
from undercroft.hypervisor.tpm import start_tpm
from undercroft.model.errors import NoSpaceError, QemuStartError

__all__ = ["Launch", "clean_run_directory", "launch", "open_output", "read_plan", "write_plan"]

PLAN_FILE = "plan.json"
OUTPUT_FIFO = "output"
_CONNECT_EARLY = ("qmp", "serial")
_CONNECT_EARLY_INCOMING = (*_CONNECT_EARLY, "helper")


@dataclass
class Launch:
    """A QEMU on its way up: its process, the sockets already in its backlogs, and the end of its
    output that we read."""

    process: Process
    output: int
    helpers: list[Process]
    connections: dict[str, socket.socket] = field(default_factory=dict)


def launch(plan: MachinePlan, line: CommandLine, firmware: FirmwareFiles | None) -> Launch:
    """Starts QEMU.

    Raises:
        QemuStartError: a file is missing, or QEMU cannot be executed. NoSpaceError: the disk is
            full.
    """
    run = Path(plan.run_directory)
    try:
        with contextlib.ExitStack() as stack:
            for directory in (run, Path(plan.directory)):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if firmware is not None:
                _prepare_nvram(Path(nvram_path(plan)), Path(firmware.variables))
            write_plan(plan)
            theirs = _open_output_writer(run)
            stack.callback(os.close, theirs)
            ours = open_output(run)
            with contextlib.ExitStack() as kept:
                kept.callback(os.close, ours)
                numbers: dict[str, int] = {}
                early = _CONNECT_EARLY_INCOMING if plan.incoming else _CONNECT_EARLY
                connections: dict[str, socket.socket] = {}
                helpers: list[Process] = []
                for handle in line.handles:
                    if handle.kind is HandleKind.TPM:
                        channel, helper = start_tpm(plan, theirs)
                        kept.callback(_reap, helper)
                        helpers.append(helper)
                        numbers[handle.name] = stack.enter_context(channel).fileno()
                        continue
                    numbers[handle.name] = _open(handle, stack, plan)
                    if handle.name in early:
                        connection = sockets.connect(Path(handle.path))
                        kept.callback(connection.close)
                        connections[handle.name] = connection
                process = spawn(
                    line.with_descriptors(numbers),
                    pass_fds=tuple(numbers.values()),
                    output=theirs,
                    directory=Path("/"),
                    mark=plan.directory,
                    uid=plan.uid,
                    gid=plan.gid,
                    group=kvm_group(plan),
                    frugal=plan.memory_file is not None and not plan.memory_shared,
                )
                kept.pop_all()
                return Launch(process, ours, helpers, connections)
    except OSError as error:
        clean_run_directory(run)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"vm {plan.name} cannot be started: the disk that holds {run} is full",
                object=f"vm {plan.name}",
                action="make room (croft image rm, croft rm), then start it again",
            ) from error
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise QemuStartError(
            f"vm {plan.name} cannot be started: {what}", object=f"vm {plan.name}"
        ) from error
    except BaseException:
        clean_run_directory(run)
        raise


def _open(handle: Handle, stack: contextlib.ExitStack, plan: MachinePlan) -> int:
    """Opens what a handle stands for; closed again with the stack (QEMU has its own copy)."""
    if handle.kind is HandleKind.LISTEN:
        listener = stack.enter_context(sockets.listen(Path(handle.path)))
        return listener.fileno()
    if handle.kind is HandleKind.KEY:
        descriptor = open_secret(handle.path, plan.uid, plan.gid)
        stack.callback(os.close, descriptor)
        return descriptor
    if handle.kind is HandleKind.MEDIUM:
        descriptor = open_medium(handle.path)
        stack.callback(os.close, descriptor)
        return descriptor
    access = os.O_RDWR if handle.kind is HandleKind.WRITE else os.O_RDONLY
    descriptor = os.open(handle.path, access | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _reap(helper: Process) -> None:
    """Ends a helper of a QEMU that never came to be."""
    helper.signal(signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(helper.pid, 0)
    helper.close()


def _prepare_nvram(path: Path, template: Path) -> None:
    """Gives the VM firmware variables of its own, at its first start."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    shutil.copyfile(template, part)
    os.chmod(part, 0o600)
    os.replace(part, path)


def _open_output_writer(run: Path) -> int:
    """A FIFO for what QEMU says, opened for both reading and writing, non-blocking.

    QEMU so holds a reader of its own: when we are gone, its writes neither fail nor block nor
    fill the disk; the last 64 KiB stay in the pipe for our successor.
    """
    path = run / OUTPUT_FIFO
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def open_output(run: Path) -> int:
    """The reading end of QEMU's output."""
    return os.open(run / OUTPUT_FIFO, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def read_plan(run: Path) -> MachinePlan:
    """The plan that the QEMU of this run directory was started with.

    Raises:
        OSError, msgspec.MsgspecError: there is none.
    """
    return decode_plan((run / PLAN_FILE).read_bytes())


def write_plan(plan: MachinePlan) -> None:
    """Keeps the plan in the run directory, for whoever takes this QEMU over."""
    path = Path(plan.run_directory) / PLAN_FILE
    part = path.with_suffix(".part")
    part.write_bytes(encode_plan(plan))
    part.replace(path)


def clean_run_directory(run: Path) -> None:
    """Removes sockets and the like of a QEMU that has ended."""
    shutil.rmtree(run, ignore_errors=True)
