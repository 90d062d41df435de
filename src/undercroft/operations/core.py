"""All operations, by noun. The API, and every other face, calls these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from undercroft.model.backup import RestoreRequest
from undercroft.model.event import Event
from undercroft.model.host import Host
from undercroft.model.requests import CheckReport, VMSample
from undercroft.model.task import Task
from undercroft.operations.access import Caller
from undercroft.operations.backups import BackupOperations
from undercroft.operations.cdroms import CdromOperations
from undercroft.operations.checkpoints import CheckpointOperations
from undercroft.operations.context import Context, find
from undercroft.operations.datastores import DatastoreOperations
from undercroft.operations.exports import ExportOperations
from undercroft.operations.images import ImageOperations
from undercroft.operations.imports import ImportOperations
from undercroft.operations.restoring import restore
from undercroft.operations.snapshots import SnapshotOperations
from undercroft.operations.tasks import TaskOperations
from undercroft.operations.templates import TemplateOperations
from undercroft.operations.uploads import UploadOperations
from undercroft.operations.vms import VMOperations
from undercroft.operations.volumes import VolumeOperations
from undercroft.store.interface import Listing, Store, Versioned


class EventOperations:
    """Every verb on events."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(
        self, caller: Caller, after: int = 0, limit: int = 100, object: str | None = None
    ) -> Listing[Event]:
        """Events later than revision ``after``, oldest first, at most ``limit``: the first ones
        after it, or the newest if ``after`` is 0. ``object``: only those about this name or id."""
        caller.require("event.view")
        limit = max(0, limit)
        listing = await self._context.store.list(Event)
        items = sorted(
            (
                item
                for item in listing.items
                if item.revision > after
                and (object is None or object in (item.record.object.id, item.record.object.name))
            ),
            key=lambda item: (item.revision, item.record.meta.created),
        )
        kept = items[:limit] if after else items[max(0, len(items) - limit) :]
        return Listing(kept, listing.revision)


class HostOperations:
    """Every verb on hosts."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def get(self, caller: Caller, ref: str = "self") -> Versioned[Host]:
        """The host with this name or id; ``self`` is the one that answers."""
        caller.require("host.view")
        return await find(self._context.store, Host, self._context.host if ref == "self" else ref)

    async def list(self, caller: Caller) -> Listing[Host]:
        """All hosts."""
        caller.require("host.view")
        return await self._context.store.list(Host)

    async def check(self, caller: Caller, repair: bool = False) -> CheckReport:
        """Looks for what a crash left behind on the host that answers."""
        caller.require("host.check")
        return await self._context.services.check(repair)

    async def check_volumes(self, caller: Caller, repair: bool = False) -> CheckReport:
        """Looks for what is wrong with the volumes of the host that answers."""
        caller.require("host.check")
        return await self._context.services.check_volumes(repair)

    async def samples(self, caller: Caller) -> Sequence[VMSample]:
        """Measurements of the VMs that run on the host that answers."""
        caller.require("vm.view")
        return await self._context.services.samples()


class BackupVerbs(BackupOperations):
    """Every verb on backups, and what becomes of them."""

    async def restore(self, caller: Caller, request: RestoreRequest) -> Task:
        """Restores a backup: as a new VM, or over one that exists."""
        return await restore(self._context, caller, request)


class Operations:
    """Every verb there is. ``store`` is for watching only."""

    def __init__(self, context: Context) -> None:
        self.store: Store = context.store
        self.host = context.host
        self.vms = VMOperations(context)
        self.cdroms = CdromOperations(context)
        self.snapshots = SnapshotOperations(context)
        self.checkpoints = CheckpointOperations(context)
        self.backups = BackupVerbs(context, self.checkpoints)
        self.templates = TemplateOperations(context)
        self.exports = ExportOperations(context)
        self.imports = ImportOperations(context)
        self.uploads = UploadOperations(context)
        self.images = ImageOperations(context)
        self.datastores = DatastoreOperations(context)
        self.volumes = VolumeOperations(context)
        self.tasks = TaskOperations(context)
        self.events = EventOperations(context)
        self.hosts = HostOperations(context)
