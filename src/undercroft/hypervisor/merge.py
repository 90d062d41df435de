"""Merging layers: one takes over what the one beneath it has, which then is not needed any more.

The content of the disk, as seen from above, is the same at every moment (QEMU: ``block-stream``),
so this may be cut off anywhere and begun again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from undercroft.hypervisor.bitmaps import copy_up
from undercroft.hypervisor.blockgraph import block_nodes, hand_over, layer_nodes
from undercroft.hypervisor.commandline import SANDBOX
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.plan import DiskLayer
from undercroft.hypervisor.process import Process, spawn
from undercroft.hypervisor.qmp import Monitor
from undercroft.hypervisor.secret import give_secret, take_secret
from undercroft.model.errors import NoSpaceError, QmpError, TimeLimitError

__all__ = [
    "absorb",
    "begun",
    "cancel_job",
    "drop_node",
    "follow_job",
    "give_up_jobs",
    "jobs_of",
    "offline",
    "reads_only",
    "reopen",
]

MERGE, FOLD = "merge-", "fold-"
_JOBS = (MERGE, FOLD)  # what the names of jobs that put layers together begin with
_POLL = 0.1
_SET = re.compile(r"/dev/fdset/(\d+)")
_START_TIMEOUT = 20.0
_END_TIMEOUT = 20.0


async def absorb(
    monitor: Monitor,
    layers: Sequence[DiskLayer],
    index: int,
    progress: Callable[[float], None] | None = None,
    fresh: Collection[str] = (),
) -> None:
    """Has layer ``index`` of a chain (0 is the top) take over the content of the one beneath it.
    ``fresh``: those of its bitmaps that begin with it.

    Raises:
        QmpError, TimeLimitError, OSError: it did not work. NoSpaceError: the disk is full. The
            chain is as it was.
    """
    upper, lower = layers[index], layers[index + 1]
    below = layers[index + 2].node if index + 2 < len(layers) else None
    job = MERGE + upper.node
    arguments: dict[str, Any] = {}
    if not await begun(monitor, job):
        nodes = await block_nodes(monitor)
        if lower.node not in nodes:
            return  # a daemon died when this was done
        if reads_only(nodes, upper):
            await reopen(monitor, upper, write=True, backing=lower.node)
        await copy_up(monitor, upper.node, lower.node, fresh)
        arguments = {"job-id": job, "device": upper.node, "auto-dismiss": False}
        if below is not None:
            # What the header is to say, which nobody follows. QEMU's own choice describes all of
            # the chain, and does not fit there any more when that is long.
            arguments |= {"base-node": below, "backing-file": below}
    try:
        if arguments:
            await monitor.execute("block-stream", arguments)
        await follow_job(monitor, job, progress)
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError):
            await asyncio.shield(cancel_job(monitor, job))
        if index and monitor.connected:
            with contextlib.suppress(QmpError, TimeLimitError, OSError):
                await asyncio.shield(reopen(monitor, upper, write=False, backing=lower.node))
        raise
    # Until now QEMU may have what it copied, and where it is, in its memory only: opening it anew
    # has all of that written.
    await reopen(monitor, upper, write=index == 0, backing=below)
    await drop_node(monitor, lower.node)


async def jobs_of(monitor: Monitor) -> dict[str, dict[str, Any]]:
    """QEMU's jobs, by their names."""
    jobs: list[dict[str, Any]] = await monitor.execute("query-jobs")
    return {job["id"]: job for job in jobs}


async def begun(monitor: Monitor, wanted: str) -> bool:
    """Whether an earlier daemon began this job. Others that put layers together are given up."""
    await give_up_jobs(monitor, spare=wanted)
    return wanted in await jobs_of(monitor)


async def give_up_jobs(monitor: Monitor, spare: str | None = None) -> None:
    """Ends all jobs that put layers together, but for one."""
    for job in await jobs_of(monitor):
        if job.startswith(_JOBS) and job != spare:
            await cancel_job(monitor, job)


async def follow_job(
    monitor: Monitor,
    id: str,
    progress: Callable[[float], None] | None = None,
    until: str = "concluded",
) -> None:
    """Waits until a job is over, or in the state ``until``.

    Raises:
        QmpError, NoSpaceError: it failed.
    """
    while (job := (await jobs_of(monitor)).get(id)) is not None:
        if job["status"] == "concluded":
            await monitor.execute("job-dismiss", {"id": id})
            if (reason := job.get("error")) is not None:
                kind = NoSpaceError if "No space left" in reason else QmpError
                raise kind(f"layers of {monitor.name} cannot be merged: {reason}")
            return
        if job["status"] == until:
            return
        if progress is not None and job.get("total-progress"):
            progress(job["current-progress"] / job["total-progress"])
        await asyncio.sleep(_POLL)


async def cancel_job(monitor: Monitor, job: str) -> None:
    """Ends a job; what it was to do is not done."""
    with contextlib.suppress(QmpError):
        await monitor.execute("job-cancel", {"id": job})
    with contextlib.suppress(QmpError, NoSpaceError):
        await follow_job(monitor, job)


def reads_only(nodes: Mapping[str, Mapping[str, Any]], layer: DiskLayer) -> bool:
    """Whether QEMU has a layer, or (after a snapshot) only its file, for reading only."""
    return any(nodes.get(name, {}).get("ro", True) for name in (layer.node, f"{layer.node}-file"))


async def reopen(monitor: Monitor, layer: DiskLayer, *, write: bool, backing: str | None) -> None:
    """Has QEMU write all that it has of a layer, and open it for writing or for reading only."""
    nodes = await block_nodes(monitor)
    number = _set_of(nodes, layer.node)
    if number is None:
        raise QmpError(f"QEMU of {monitor.name} does not have {layer.node}")
    other = nodes[f"{layer.node}-file"]["ro"] == write
    before: list[int] = []
    if other:
        sets = await monitor.execute("query-fdsets")
        before = [
            one["fd"] for known in sets if known["fdset-id"] == number for one in known["fds"]
        ]
        for access in (os.O_RDONLY, os.O_RDWR) if write else (os.O_RDONLY,):
            await hand_over(monitor, layer.path, access, number)
    options = layer_nodes(layer, f"/dev/fdset/{number}", write=write, backing=backing)
    await monitor.execute("blockdev-reopen", {"options": list(options)})
    # QEMU's locks stay on an open file for as long as the set holds it, and would be in our way.
    for number_in_set in before:
        await monitor.execute("remove-fd", {"fdset-id": number, "fd": number_in_set})


def _set_of(nodes: Mapping[str, Mapping[str, Any]], node: str) -> int | None:
    """The fdset that the file of a node is in; None if there is no such node."""
    file = nodes.get(f"{node}-file")
    match = _SET.fullmatch(str(file["file"])) if file is not None else None
    return int(match[1]) if match is not None else None


async def drop_node(monitor: Monitor, node: str) -> None:
    """Closes a layer that nothing lies on any more."""
    number = _set_of(await block_nodes(monitor), node)
    if number is None:  # a daemon died after it was closed
        return
    for name in (node, f"{node}-file"):
        await monitor.execute("blockdev-del", {"node-name": name})
    await take_secret(monitor, node)
    with contextlib.suppress(QmpError):  # another disk of the VM may lie on the same file
        await monitor.remove_set(number)


@contextlib.asynccontextmanager
async def offline(
    layers: Sequence[DiskLayer],
    emulator: Emulator,
    mark: Path,
    uid: int | None,
    *,
    write: bool = False,
) -> AsyncIterator[Monitor]:
    """The chain of a disk that no guest uses, opened by a QEMU without a machine, which ends with
    the block. (``qemu-storage-daemon`` takes no descriptors.)

    ``mark``: the directory of the VM that it counts as a
    process of; ``uid``: whom it runs as; ``write``: the top layer is opened for writing.

    Raises:
        QmpError, TimeLimitError, OSError: it does not start, or cannot open them.
    """
    # Connected from the beginning: a QEMU without a machine is ready so soon that two of its
    # threads would accept a connection at the same time, and share what comes through it.
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process: Process | None = None
    monitor = Monitor(f"the disk of {mark.name}", lambda event: None, lambda: None)
    try:
        process = await asyncio.to_thread(_spawn, emulator, theirs.fileno(), mark, uid)
        theirs.close()
        await monitor.connect(ours, timeout=_START_TIMEOUT)
        below: str | None = None
        for layer in reversed(layers):
            number = await hand_over(monitor, layer.path, os.O_RDONLY)
            top = write and layer is layers[0]
            if top:
                await hand_over(monitor, layer.path, os.O_RDWR, number)
            await give_secret(monitor, layer.node, layer.key)
            for node in layer_nodes(layer, f"/dev/fdset/{number}", write=top, backing=below):
                await monitor.execute("blockdev-add", node)
            below = layer.node
        yield monitor
    finally:
        theirs.close()
        await monitor.close()
        ours.close()
        if process is not None:
            await asyncio.shield(_end(process))


def _spawn(emulator: Emulator, connection: int, mark: Path, uid: int | None) -> Process:
    argv = [emulator.path, "-machine", "none", "-nodefaults", "-no-user-config"]
    # Stopped: else it tells that it runs, perhaps before its greeting.
    argv += ["-S", "-display", "none", "-sandbox", SANDBOX]
    argv += ["-chardev", f"socket,id=qmp,fd={connection}"]
    argv += ["-mon", "chardev=qmp,mode=control"]
    with open(os.devnull, "wb") as output:
        return spawn(
            argv,
            pass_fds=(connection,),
            output=output.fileno(),
            directory=Path("/"),
            mark=str(mark),
            uid=uid,
            gid=uid,
        )


async def _end(process: Process) -> None:
    """Lets it close its files, which takes a moment; if it does not, ends it."""
    process.signal(signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _END_TIMEOUT)
        return
    process.signal(signal.SIGKILL)
    await process.wait()
