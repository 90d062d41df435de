"""The virtual TPM's other half: one swtpm process per VM, which ends with its QEMU."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from pathlib import Path

from undercroft.hypervisor.plan import MachinePlan
from undercroft.hypervisor.process import Process, spawn
from undercroft.model.errors import MissingToolError

__all__ = ["start_tpm", "tpm_directory"]


def tpm_directory(plan: MachinePlan) -> Path:
    """Where the TPM keeps its state: keys that the guest sealed are lost with it."""
    return Path(plan.directory) / "tpm"


def start_tpm(plan: MachinePlan, output: int) -> tuple[socket.socket, Process]:
    """Starts swtpm. The socket is QEMU's end of the control channel; the process ends when that
    is closed, and wants to be reaped. ``output`` is where it says what is wrong.

    swtpm has no other way to be reached, and ends when the channel closes (``--terminate``), so
    there is nothing to adopt or to look after: it lives exactly as long as its QEMU.

    Raises:
        MissingToolError: swtpm is not installed.
        OSError: its directory cannot be made.
    """
    program = shutil.which("swtpm", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin")
    if program is None:
        raise MissingToolError(
            "swtpm is not installed, so there can be no TPM", action="install the package swtpm"
        )
    state = tpm_directory(plan)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if plan.uid is not None:
        # swtpm opens its state by path: it gets a directory of its own, through a descriptor,
        # since the directories above are closed to it.
        gid = plan.gid if plan.gid is not None else plan.uid
        os.chown(state, plan.uid, gid)
        for entry in os.scandir(state):
            # What is in there was written by an earlier swtpm: take nothing else for its files.
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                os.chown(entry.path, plan.uid, gid, follow_symlinks=False)
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(theirs)
        failed = stack.enter_context(contextlib.ExitStack())
        failed.callback(ours.close)
        directory = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        process = spawn(
            [
                program,
                "socket",
                "--tpm2",
                "--tpmstate",
                f"dir=/proc/self/fd/{directory},mode=0600",
                "--ctrl",
                f"type=unixio,clientfd={theirs.fileno()}",
                "--flags",
                "startup-clear",
                "--terminate",
                "--seccomp",
                "action=kill",
            ],
            pass_fds=(theirs.fileno(), directory),
            output=output,
            mark=plan.directory,
            directory=Path("/"),
            uid=plan.uid,
            gid=plan.gid,
        )
        failed.pop_all()
    return ours, process
