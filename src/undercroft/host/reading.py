"""Reading what a VM's disks held at a checkpoint: for backups, and for whoever asks the API.

A QEMU without a machine opens the layers, which nobody writes to any more, so reading does not
concern the VM at all: it may run, stop, or be killed meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.host.layers import plan_layers
from undercroft.host.marks import marked_layers
from undercroft.hypervisor import sockets
from undercroft.hypervisor.export import CHANGED, Export, exported
from undercroft.hypervisor.plan import DiskLayer
from undercroft.model.backup import CHUNK
from undercroft.model.checkpoint import ChangedExtent, Changes, Checkpoint, CheckpointState
from undercroft.model.errors import ConflictError, HypervisorError, WrongStateError
from undercroft.model.names import new_id
from undercroft.model.vm import VM
from undercroft.storage.nbd import ALLOCATION, DIRTY, ZERO, NbdClient, dirty_context
from undercroft.storage.threads import Stop, in_thread

T = TypeVar("T")

_PIECE = 1 << 20
LOST = "what was marked since is lost: QEMU was killed, or the VM went back to a snapshot"


@dataclass
class DiskReader:
    """A disk at a checkpoint, for one thread. ``changed``: where it differs from an earlier one
    (offset, length; ascending); None: not known, and ``why``."""

    client: NbdClient
    changed: list[tuple[int, int]] | None
    why: str | None

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.client.size

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that may hold anything but zeroes."""
        for extent in self.client.extents(ALLOCATION, offset, length):
            if not extent.flags & ZERO:
                yield extent.offset, extent.length

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
        """The content of ranges, in their order."""
        return self.client.read(ranges)


async def with_disk(
    environment: Environment,
    vm: VM,
    checkpoint: Checkpoint,
    index: int,
    since: Checkpoint | None,
    work: Callable[[DiskReader, Stop], T],
) -> T:
    """Does something with a disk at a checkpoint in a thread.

    Raises:
        HypervisorError: the disk cannot be read. What ``work`` raises.
    """
    disk = checkpoint.status.disks[index]
    why: str | None = "there is nothing to count from"
    count = None
    if since is not None:
        count = await marked_layers(environment, disk, since)
        why = LOST if count is None else None
    layers = await plan_layers(environment, disk.layer, index)
    marks = (since.meta.id, count) if since is not None and count else None
    async with serving(environment, vm, layers, since=marks) as export:
        if marks is not None and export.why is not None:
            why = export.why

        def read(stop: Stop) -> T:
            known = why is None
            contexts = [ALLOCATION]
            if known and marks is not None:
                contexts.append(dirty_context(CHANGED))
            with opened(export, contexts, stop) as client:
                changed: list[tuple[int, int]] | None = None
                if known:
                    changed = []
                    if marks is not None:
                        told = client.extents(dirty_context(CHANGED), 0, client.size)
                        changed = [(e.offset, e.length) for e in told if e.flags & DIRTY]
                return work(DiskReader(client, changed, why), stop)

        found = await in_thread(read)
    await still_open(environment, checkpoint)
    return found


async def still_open(environment: Environment, checkpoint: Checkpoint) -> None:
    """Makes sure that what was read is what the checkpoint held: its layers stay as they are until
    after it is written down that it is let go.

    Raises:
        WrongStateError: it was let go meanwhile.
    """
    found = await environment.store.get(Checkpoint, checkpoint.meta.id)
    if found is None or found.record.status.state is not CheckpointState.OPEN:
        raise WrongStateError(
            f"{checkpoint.label} was let go while it was read",
            object=checkpoint.label,
            action="begin again with a new checkpoint",
        )


@contextlib.contextmanager
def opened(export: Export, contexts: Sequence[str], stop: Stop) -> Iterator[NbdClient]:
    """A connection to an export, which ends when the work is to stop.

    Raises:
        HypervisorError: nobody answers.
    """
    try:
        connection = sockets.connect(export.socket)
    except OSError as error:
        raise HypervisorError(f"the disk is not served: {error}") from error
    client = NbdClient(connection, export.name, contexts)
    stop.also(client.abort)
    try:
        yield client
    except HypervisorError:
        stop.check()  # it went away because we were to stop
        raise
    finally:
        client.close()


@contextlib.asynccontextmanager
async def serving(
    environment: Environment,
    vm: VM,
    layers: Sequence[DiskLayer],
    *,
    since: tuple[str, int] | None = None,
    write: bool = False,
) -> AsyncIterator[Export]:
    """Serves layers of a VM inside the block, by a QEMU that ends with this daemon or its
    successor's start.

    Raises:
        HypervisorError: it does not start, or cannot open them.
    """
    name = new_id("task")
    directory = environment.directory.new_tmp(name)
    await asyncio.to_thread(partial(directory.mkdir, mode=0o700))
    # Marked as no VM's, so that the next daemon ends it if this one cannot.
    mark = environment.vm_directory(vm.meta.id).with_name(name)
    environment.serving.add(name)
    try:
        emulator = await environment.emulator(vm.spec.arch)
        async with contextlib.AsyncExitStack() as stack:
            try:
                export = await stack.enter_async_context(
                    exported(
                        layers,
                        emulator,
                        directory,
                        mark,
                        vm.status.uid,
                        since=since,
                        write=write,
                    )
                )
            except OSError as error:
                raise HypervisorError(f"a disk of {vm.label} cannot be opened: {error}") from error
            yield export
    finally:
        environment.serving.discard(name)
        await asyncio.shield(asyncio.to_thread(remove_tree, directory))


def unknown(checkpoint: Checkpoint, why: str) -> ConflictError:
    """The error where it cannot be told what has changed."""
    return ConflictError(
        f"what changed until {checkpoint.label} is not known: {why}",
        object=checkpoint.label,
        action="read the whole disk: ask for its changes without since",
    )


async def changes(
    environment: Environment, vm: VM, checkpoint: Checkpoint, disk: int, since: Checkpoint | None
) -> Changes:
    """What of a disk at an open checkpoint is not what it was at an earlier one, or without one
    all that is not zeroes.

    Raises:
        ConflictError: it is not known.
    """

    def work(reader: DiskReader, stop: Stop) -> Changes:
        if since is not None and reader.changed is None:
            raise unknown(checkpoint, reader.why or "")
        parts = reader.changed if since is not None else reader.data(0, reader.size)
        if since is not None:
            before = next(
                (one.size for one in since.status.disks if one.volume == volume), reader.size
            )
            parts = with_grown(parts or (), before, reader.size)
        found: list[ChangedExtent] = []
        for offset, length in rounded(parts or (), reader.size):
            stop.check()
            held = list(rounded(reader.data(offset, length), reader.size))
            found += _with_zeroes(offset, length, held)
        return Changes(
            size=reader.size,
            since=since.meta.id if since is not None else None,
            extents=tuple(found),
        )

    volume = checkpoint.status.disks[disk].volume
    return await with_disk(environment, vm, checkpoint, disk, since, work)


def with_grown(parts: Iterable[tuple[int, int]], before: int, size: int) -> list[tuple[int, int]]:
    """Parts (offset, length; ascending) together with what a disk has grown by, of which some may
    have been written to already."""
    grown = [(before, size - before)] if before < size else []
    return sorted([*parts, *grown])


def _with_zeroes(
    offset: int, length: int, held: Sequence[tuple[int, int]]
) -> Iterator[ChangedExtent]:
    """A part as those that hold something, and those that are zeroes."""
    at = offset
    for start, size in held:
        if at < start:
            yield ChangedExtent(offset=at, length=start - at, zero=True)
        yield ChangedExtent(offset=start, length=size)
        at = start + size
    if at < offset + length:
        yield ChangedExtent(offset=at, length=offset + length - at, zero=True)


def rounded(parts: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Parts (offset, length; ascending) in whole chunks; those that touch are put together."""
    start = end = -1
    for offset, length in parts:
        low = offset // CHUNK * CHUNK
        high = min(size, -(-(offset + length) // CHUNK) * CHUNK)
        if start >= 0 and low <= end:
            end = max(end, high)
            continue
        if start >= 0:
            yield start, end - start
        start, end = low, high
    if start >= 0:
        yield start, end - start


async def read_disk(
    environment: Environment, vm: VM, checkpoint: Checkpoint, disk: int, offset: int, length: int
) -> AsyncIterator[bytes]:
    """A part of a disk at an open checkpoint.

    Raises:
        HypervisorError: it cannot be read.
    """
    layers = await plan_layers(environment, checkpoint.status.disks[disk].layer, disk)
    async with serving(environment, vm, layers) as export:
        stop = Stop()
        stack = contextlib.ExitStack()
        client = await asyncio.to_thread(stack.enter_context, opened(export, (), stop))
        try:
            ranges = (
                (at, min(_PIECE, offset + length - at))
                for at in range(offset, offset + length, _PIECE)
            )
            pieces = client.read(ranges)
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                await still_open(environment, checkpoint)
                yield bytes(piece[1])
        finally:
            stop.set()
            await asyncio.to_thread(stack.close)
