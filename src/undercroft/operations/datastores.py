"""Datastores: where the disks of VMs are kept."""

from __future__ import annotations

import asyncio
import contextlib
import os.path

import msgspec

from undercroft.model.base import Meta
from undercroft.model.datastore import (
    Datastore,
    DatastoreSpec,
    DatastoreState,
    DatastoreStatus,
    check_thresholds,
)
from undercroft.model.errors import (
    AlreadyExistsError,
    InUseError,
    InvalidError,
    StaleError,
    UnavailableError,
    WrongStateError,
)
from undercroft.model.layer import Layer
from undercroft.model.names import check_labels, check_name, new_id
from undercroft.model.requests import DatastoreChange, DatastoreCreate
from undercroft.model.template import Template
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    check_unchanged,
    find,
    new_event,
    scope,
)
from undercroft.store.interface import (
    Check,
    Claim,
    Delete,
    Listing,
    Put,
    Release,
    Store,
    Transaction,
    Versioned,
)

PATIENCE = 20.0  # seconds until what was made by itself is gone
LOOK = 0.05


class DatastoreOperations:
    """Every verb on datastores."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self, caller: Caller) -> Listing[Datastore]:
        """All datastores, with what they take as of now."""
        caller.require("datastore.view")
        await self._context.services.measure()
        return await self._context.store.list(Datastore)

    async def get(self, caller: Caller, ref: str) -> Versioned[Datastore]:
        """The datastore with this name or id."""
        caller.require("datastore.view")
        await self._context.services.measure()
        return await find(self._context.store, Datastore, ref)

    async def create(self, caller: Caller, request: DatastoreCreate) -> Versioned[Datastore]:
        """Makes a directory of the host a datastore. The directory is made if need be.

        Raises:
            InvalidError: the name, the path or a threshold makes no sense.
            AlreadyExistsError: the name is taken, or the path is a datastore already.
            DataError: the daemon cannot write there, or there are disks that are none of ours.
        """
        caller.require("datastore.create")
        caller.require("host.files")
        check_name(request.name, "datastore")
        check_labels(request.labels)
        check_thresholds(request.warning, request.critical)
        context, path = self._context, _checked_path(request.path)
        if await context.store.resolve(scope("datastore"), request.name) is not None:
            raise _already_exists(request.name)
        id = new_id("datastore")
        reflink = await context.services.prepare_datastore(path, id)
        datastore = Datastore(
            meta=Meta(id=id, name=request.name, created=context.clock(), labels=request.labels),
            spec=DatastoreSpec(
                host=context.host,
                path=path,
                default=request.default,
                warning=request.warning,
                critical=request.critical,
            ),
            status=DatastoreStatus(reflink=reflink),
        )
        told = f"{datastore.label} was created at {path}"
        event = new_event(context.clock(), "datastore.created", datastore, told, by=caller.name)
        for _ in range(ATTEMPTS):
            checks, puts = (
                await _no_default(self._context.store, id) if request.default else ([], [])
            )
            try:
                await context.store.transact(
                    Transaction(
                        checks=checks,
                        claims=[Claim(scope("datastore"), request.name, id)],
                        puts=[*puts, Put(datastore), Put(event)],
                    )
                )
            except StaleError:
                continue
            except AlreadyExistsError:
                await context.services.forget_datastore(datastore)
                raise _already_exists(request.name) from None
            await context.services.measure(now=True)
            return await find(context.store, Datastore, id)
        await context.services.forget_datastore(datastore)
        raise StaleError("others keep changing datastores", action="try again")

    async def set(
        self, caller: Caller, ref: str, request: DatastoreChange, if_match: int | None = None
    ) -> Versioned[Datastore]:
        """Changes the name or the thresholds of a datastore, or makes it the default.

        Raises:
            InvalidError: that makes no sense. AlreadyExistsError: the name is taken.
            StaleError: it changed meanwhile.
        """
        caller.require("datastore.change")
        context = self._context
        for _ in range(ATTEMPTS):
            found = await find(context.store, Datastore, ref)
            check_unchanged(found, if_match)
            old = found.record
            names = ("warning", "critical")
            values = {n: v for n in names if (v := getattr(request, n)) is not None}
            if request.default is not None:
                _check_default(old, request.default)
                values["default"] = True
            spec = msgspec.structs.replace(old.spec, **values)
            check_thresholds(spec.warning, spec.critical)
            name = check_name(request.name or old.meta.name, "datastore")
            renamed = name != old.meta.name
            if renamed and old.spec.builtin:
                raise InvalidError(
                    f"{old.label} keeps its name", action="only its thresholds can be changed"
                )
            if spec == old.spec and not renamed:
                return found
            meta = msgspec.structs.replace(old.meta, name=name, generation=old.meta.generation + 1)
            id = meta.id
            moved = spec.default and not old.spec.default
            checks, puts = await _no_default(self._context.store, id) if moved else ([], [])
            try:
                await context.store.transact(
                    Transaction(
                        checks=[*checks, Check(Datastore, id, found.revision)],
                        releases=[Release(scope("datastore"), old.meta.name, id)] * renamed,
                        claims=[Claim(scope("datastore"), name, id)] * renamed,
                        puts=[*puts, Put(msgspec.structs.replace(old, meta=meta, spec=spec))],
                    )
                )
            except StaleError:
                if if_match is not None:
                    check_unchanged(await find(context.store, Datastore, id), if_match)
                continue
            except AlreadyExistsError:
                raise _already_exists(name) from None
            await context.services.measure(now=True)
            return await find(context.store, Datastore, id)
        raise StaleError(f"others keep changing datastore {ref}", action="try again")

    async def remove(self, caller: Caller, ref: str) -> Datastore:
        """Makes a directory no datastore any more; the directory stays.

        Raises:
            InUseError: volumes, snapshots or templates have something in it.
        """
        caller.require("datastore.remove")
        found = await find(self._context.store, Datastore, ref)
        if found.record.spec.builtin:
            raise InUseError(
                f"{found.record.label} is where the data directory's own disks are",
                object=found.record.label,
                action="it cannot be removed",
            )
        # From now on nobody puts anything there: whoever does checks that it is ready.
        await self._mark(found.record.meta.id, DatastoreState.REMOVING)
        users = await self._users(found.record)
        if not users and await self._forget_warm(found.record):
            for _ in range(int(PATIENCE / LOOK)):
                if not await self._layers(found.record):
                    break
                await asyncio.sleep(LOOK)
            users = await self._users(found.record)
        if users:
            before = found.record.status.state
            removing = before is DatastoreState.REMOVING  # a daemon died over it
            await self._mark(found.record.meta.id, DatastoreState.READY if removing else before)
            raise InUseError(
                f"{found.record.label} is used by {users}",
                object=found.record.label,
                action="remove them, or copy what you need elsewhere first:\n"
                "croft volume clone VOLUME NEW --full --datastore OTHER\n"
                "what is elsewhere and only lies on something there: croft volume flatten VOLUME\n"
                "how they lie on each other: croft volume tree",
            )
        id, name = found.record.meta.id, found.record.meta.name
        told = f"{found.record.label} was removed; its directory stays"
        event = new_event(
            self._context.clock(), "datastore.removed", found.record, told, by=caller.name
        )
        for _ in range(ATTEMPTS):
            now = await find(self._context.store, Datastore, id)
            checks, puts = (
                await _default_again(self._context.store) if now.record.spec.default else ([], [])
            )
            try:
                await self._context.store.transact(
                    Transaction(
                        checks=[*checks, Check(Datastore, id, now.revision)],
                        deletes=[Delete(Datastore, id)],
                        releases=[Release(scope("datastore"), name, id)],
                        puts=[*puts, Put(event)],
                    )
                )
            except StaleError:
                continue
            await self._context.services.forget_datastore(found.record)
            return found.record
        raise StaleError(f"others keep changing datastore {name}", action="try again")

    async def _mark(self, id: str, state: DatastoreState) -> None:
        store = self._context.store
        for _ in range(ATTEMPTS):
            found = await find(store, Datastore, id)
            status = msgspec.structs.replace(found.record.status, state=state)
            wanted = msgspec.structs.replace(found.record, status=status)
            try:
                await store.transact(
                    Transaction(checks=[Check(Datastore, id, found.revision)], puts=[Put(wanted)])
                )
            except StaleError:
                continue
            return
        raise StaleError(f"others keep changing datastore {id}", action="try again")

    async def _layers(self, datastore: Datastore) -> bool:
        """Whether any layer is in it."""
        listing = await self._context.store.list(Layer)
        return any(i.record.spec.datastore == datastore.meta.id for i in listing.items)

    async def _needed(self, datastore: Datastore, head: str) -> bool:
        """Whether a layer lies in it, or on one that does."""
        at: str | None = head
        while at:
            found = await self._context.store.get(Layer, at)
            if found is None:
                return False
            if found.record.spec.datastore == datastore.meta.id:
                return True
            at = found.record.spec.parent
        return False

    async def _users(self, datastore: Datastore) -> str:
        """Who needs what is in it, in words; what was made by itself does not count."""
        store = self._context.store
        vms = {item.record.meta.id: item.record for item in (await store.list(VM)).items}
        labels = []
        for item in (await store.list(Volume)).items:
            volume = item.record
            owner = vms.get(volume.spec.vm or "")
            if owner is not None and (owner.status.held is not None or owner.spec.passing):
                continue
            waits = not volume.status.head and volume.spec.datastore == datastore.meta.id
            if waits or await self._needed(datastore, volume.status.head):
                labels.append(volume.label)
        warm = False
        for template in (await store.list(Template)).items:
            disks = template.record.status.disks
            if not any([await self._needed(datastore, disk.layer) for disk in disks]):
                continue
            if template.record.spec.warm:
                warm = True
            else:
                labels.append(template.record.label)
        if labels:
            return ", ".join(labels[:5]) + (" and others" if labels[5:] else "")
        return "" if warm or not await self._layers(datastore) else "a snapshot"

    async def _forget_warm(self, datastore: Datastore) -> bool:
        """Removes the templates in it that were made by themselves; whether there were any."""
        found = False
        for item in (await self._context.store.list(Template)).items:
            template = item.record
            id = template.meta.id
            disks = template.status.disks
            if not template.spec.warm or not any(
                [await self._needed(datastore, disk.layer) for disk in disks]
            ):
                continue
            found = True
            with contextlib.suppress(StaleError):
                await self._context.store.transact(
                    Transaction(
                        checks=[Check(Template, id, item.revision)],
                        deletes=[Delete(Template, id)],
                        releases=[Release(scope("template"), template.meta.name, id)],
                    )
                )
        return found


async def place_new(context: Context, ref: str | None) -> Versioned[Datastore] | None:
    """`place` for what lies on nothing: where it was not said which, the default."""
    if ref is None:
        for item in (await context.store.list(Datastore)).items:
            if item.record.spec.default and not item.record.spec.builtin:
                ref = item.record.meta.id
    return await place(context, ref)


async def place(context: Context, ref: str | None) -> Versioned[Datastore] | None:
    """The datastore that something is to be put in; None: it was not said which. Whoever puts
    something there checks in the transaction that it has not changed.

    Raises:
        NotFoundError: there is none. UnavailableError, WrongStateError: nothing can be put there.
    """
    if ref is None:
        return None
    found = await find(context.store, Datastore, ref)
    datastore = found.record
    if datastore.status.state is DatastoreState.UNAVAILABLE:
        raise UnavailableError(
            datastore.status.message or f"{datastore.label} is not there",
            object=datastore.label,
            action=f"mount it at {datastore.spec.path}, then try again",
        )
    if datastore.status.state is not DatastoreState.READY:
        raise WrongStateError(
            f"{datastore.label} is being removed",
            object=datastore.label,
            action="choose another",
            state=datastore.status.state,
        )
    return found


def place_id(found: Versioned[Datastore] | None) -> str | None:
    """How specs name it; None: the one in the data directory, or wherever it fits."""
    return found.record.meta.id if found is not None and not found.record.spec.builtin else None


def place_checks(found: Versioned[Datastore] | None) -> list[Check]:
    """What holds for as long as something may be put there."""
    if found is None:
        return []
    return [Check(Datastore, found.record.meta.id, found.revision)]


async def _no_default(store: Store, other: str) -> tuple[list[Check], list[Put]]:
    """Takes the default from whichever has it but ``other``."""
    checks, puts = [], []
    for item in (await store.list(Datastore)).items:
        if item.record.spec.default and item.record.meta.id != other:
            checks.append(Check(Datastore, item.record.meta.id, item.revision))
            puts.append(Put(_with_default(item.record, False)))
    return checks, puts


async def _default_again(store: Store) -> tuple[list[Check], list[Put]]:
    """Gives the default back to the one in the data directory."""
    for item in (await store.list(Datastore)).items:
        if item.record.spec.builtin:
            check = Check(Datastore, item.record.meta.id, item.revision)
            return [check], [Put(_with_default(item.record, True))]
    return [], []


def _with_default(datastore: Datastore, default: bool) -> Datastore:
    spec = msgspec.structs.replace(datastore.spec, default=default)
    return msgspec.structs.replace(datastore, spec=spec)


def _check_default(datastore: Datastore, wanted: bool) -> None:
    if not wanted:
        raise InvalidError(
            f"{datastore.label} cannot just cease to be the default",
            object=datastore.label,
            action="make another one the default: croft datastore set local --default",
        )


def _already_exists(name: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"datastore {name} already exists",
        object=f"datastore {name}",
        action="choose another name",
    )


def _checked_path(path: str) -> str:
    if not path.startswith("/") or "\0" in path or len(path) > 1024 or not path.isprintable():
        raise InvalidError(
            f"{path[:80]!r} is not an absolute path of the host", action="begin it with /"
        )
    return os.path.normpath(path)
