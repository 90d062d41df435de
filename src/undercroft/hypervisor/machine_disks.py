"""What can be done with the disks and drives of a running machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from undercroft.hypervisor.branch import branch, written_nodes
from undercroft.hypervisor.fold import begin_fold, drop_folded, end_fold
from undercroft.hypervisor.hotplug import (
    limit,
    plug,
    plug_drive,
    resize,
    unplug,
    unplug_drive,
)
from undercroft.hypervisor.launch import write_plan
from undercroft.hypervisor.medium import change_medium, check_medium
from undercroft.hypervisor.merge import absorb, give_up_jobs
from undercroft.hypervisor.plan import DiskLayer, PlanCdrom, PlanDisk, unit_of
from undercroft.hypervisor.session import MachineSession
from undercroft.hypervisor.state import STOPPED, RunState, needs
from undercroft.model.errors import UndercroftError
from undercroft.model.vm import DiskBus
from undercroft.model.volume import IOLimits

__all__ = ["MachineDisks"]

_STARTED = (RunState.RUNNING, *STOPPED)


class MachineDisks(MachineSession):
    """The part of `QemuMachine` that is about its disks."""

    @needs(*_STARTED)
    async def branch(self, disks: tuple[PlanDisk, ...]) -> None:
        """Has the guest's disks written to other files from one moment on, over those that they
        were written to until then. ``disks``: all of them, as they are to be. May be repeated.

        Raises:
            QmpError, TimeLimitError, OSError: it did not work (`branched` tells).
        """
        await branch(self._monitor, disks)
        await self._became(disks=disks)

    @needs(*_STARTED)
    async def attach(self, disk: PlanDisk) -> None:
        """Gives the guest one more disk. May be repeated.

        Raises:
            UnsupportedError: not while it runs.
            QmpError, TimeLimitError, OSError: it did not work; the machine is as it was.
        """
        await plug(self._monitor, self.plan, disk)
        others = tuple(d for i, d in enumerate(self.plan.disks) if unit_of(d, i) != disk.unit)
        await self._became(disks=(*others, disk), scsi=self.plan.scsi or disk.bus is DiskBus.SCSI)

    @needs(*_STARTED)
    async def release(self, disk: PlanDisk) -> None:
        """Has the guest let go of a disk, and closes its files. May be repeated.

        Raises:
            UnsupportedError: not while it runs. TimeLimitError: the guest does not.
            QmpError: QEMU refuses.
        """
        await unplug(self._monitor, self.plan, disk)
        disks = enumerate(self.plan.disks)
        await self._became(disks=tuple(d for i, d in disks if unit_of(d, i) != disk.unit))

    async def resize(self, disk: PlanDisk, size: int) -> None:
        """Makes a disk larger (bytes); the guest sees it at once.

        Raises:
            UnsupportedError: not on its bus.
            QmpError, TimeLimitError: it did not work.
        """
        await resize(self._monitor, disk, size)

    async def limit(self, unit: int, limits: IOLimits) -> None:
        """Has a disk do no more than this from now on.

        Raises:
            QmpError, TimeLimitError: it did not work.
        """
        await limit(self._monitor, f"disk{unit}-dev", limits)

    @needs(*_STARTED)
    async def add_drive(self, drive: PlanCdrom) -> None:
        """Gives the guest one more CD-ROM drive, with what is in it. May be repeated.

        Raises:
            UnsupportedError: not while it runs. NotFoundError, InvalidError: what is to be in it
                cannot be. QmpError, TimeLimitError: it did not work.
        """
        if drive.path is not None:
            await asyncio.to_thread(check_medium, drive.path)
        await plug_drive(self._monitor, self.plan, drive)
        empty = msgspec.structs.replace(drive, path=None)
        drives = (*self._drives_but(drive), empty)
        await self._became(cdroms=drives, scsi=True)
        if drive.path is None:
            return
        try:
            await self.change_medium(drive)
        except BaseException:
            if self._monitor.connected:
                with contextlib.suppress(UndercroftError):
                    await asyncio.shield(self.remove_drive(drive))
            raise

    @needs(*_STARTED)
    async def remove_drive(self, drive: PlanCdrom) -> None:
        """Takes a CD-ROM drive away, with what is in it. May be repeated.

        Raises:
            UnsupportedError: not while it runs. InUseError: the guest has locked it.
            TimeLimitError: the guest does not let go of it. QmpError: QEMU refuses.
        """
        await unplug_drive(self._monitor, self.plan, drive)
        await self._became(cdroms=self._drives_but(drive))

    def _drives_but(self, drive: PlanCdrom) -> tuple[PlanCdrom, ...]:
        return tuple(known for known in self.plan.cdroms if known.unit != drive.unit)

    @needs(*_STARTED)
    async def change_medium(self, drive: PlanCdrom, *, force: bool = False) -> None:
        """See `undercroft.hypervisor.medium`."""
        await change_medium(self._monitor, drive, force=force)
        drives = (drive if known.unit == drive.unit else known for known in self.plan.cdroms)
        await self._became(cdroms=tuple(drives))

    async def _became(self, **changes: Any) -> None:
        self.plan = msgspec.structs.replace(self.plan, **changes)
        await asyncio.to_thread(write_plan, self.plan)

    async def absorb(
        self,
        layers: Sequence[DiskLayer],
        index: int,
        progress: Callable[[float], None] | None = None,
        fresh: Collection[str] = (),
    ) -> None:
        """Has layer ``index`` of a disk's chain take over the content of the one beneath it, while
        the guest goes on; that one is closed then. ``fresh``: its bitmaps that begin with it.

        Raises:
            QmpError, TimeLimitError, NoSpaceError, OSError: it did not work; all is as it was.
        """
        await absorb(self._monitor, layers, index, progress, fresh)

    async def begin_fold(
        self,
        layers: Sequence[DiskLayer],
        keep: Collection[str],
        fresh: Collection[str],
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """See `undercroft.hypervisor.fold`."""
        await begin_fold(self._monitor, layers, keep, fresh, progress)

    async def end_fold(self, layers: Sequence[DiskLayer]) -> None:
        """See `undercroft.hypervisor.fold`; for a guest that stands still."""
        await end_fold(self._monitor, layers)

    async def drop_folded(self, disks: tuple[PlanDisk, ...]) -> None:
        """Closes layers that were folded; ``disks`` as they are now."""
        keep = {disk.node for disk in disks} | {n.node for disk in disks for n in disk.backing}
        await drop_folded(self._monitor, keep)
        await self._became(disks=disks)

    async def give_up_merging(self) -> None:
        """Ends what puts layers together; they stay apart."""
        await give_up_jobs(self._monitor)

    async def written(self) -> list[str]:
        """The nodes that the disks are written to.

        Raises:
            QmpError, TimeLimitError: QEMU does not tell.
        """
        return await written_nodes(self._monitor, self.plan.disks)

    async def branched(self, disks: tuple[PlanDisk, ...]) -> bool:
        """Whether the disks are written to these files.

        Raises:
            QmpError, TimeLimitError: QEMU does not tell.
        """
        return await written_nodes(self._monitor, disks) == [disk.node for disk in disks]
