"""``croft host check``: holds what is on disk and in the process table against the store.

A running daemon cleans up after itself, and a starting one after its predecessor; this finds what
is left all the same, says so, and removes or records it on request. It never touches anything
that a record accounts for, and nothing outside the data directory.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from undercroft.host import orphans
from undercroft.host.datastores import file_name
from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.host.layers import collect_layers
from undercroft.host.outcome import write
from undercroft.model.errors import AlreadyExistsError, StaleError
from undercroft.model.export import Export
from undercroft.model.image import Image, ImageState
from undercroft.model.layer import Layer
from undercroft.model.requests import CheckFinding, CheckReport
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.vm import VM, VMState
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.context import scope
from undercroft.operations.vm_change import removal_releases
from undercroft.store.interface import (
    Check,
    Claim,
    Delete,
    Release,
    Store,
    Transaction,
    Versioned,
)

GRACE = 3600.0  # seconds that a file in DATA/tmp may be older than and still be in use


@dataclass(frozen=True)
class _Records:
    """What the store says there is. Listed after the files were, so that what came to be in
    between is not taken for stray; volumes before the VMs that they go with."""

    volumes: dict[str, Versioned[Volume]]
    layers: dict[str, Layer]
    templates: set[str]
    exports: set[str]
    images: dict[str, Image]
    vms: dict[str, Versioned[VM]]
    tasks: set[str]

    @classmethod
    async def read(cls, store: Store) -> _Records:
        volumes = {i.record.meta.id: i for i in (await store.list(Volume)).items}
        layers = {i.record.meta.id: i.record for i in (await store.list(Layer)).items}
        templates = {i.record.meta.id for i in (await store.list(Template)).items}
        exports = {i.record.meta.id for i in (await store.list(Export)).items}
        images = {i.record.meta.id: i.record for i in (await store.list(Image)).items}
        vms = {i.record.meta.id: i for i in (await store.list(VM)).items}
        tasks = {i.record.meta.id for i in (await store.list(Task)).items}
        return cls(volumes, layers, templates, exports, images, vms, tasks)


async def check_host(
    environment: Environment, owned: Callable[[], set[str]], repair: bool
) -> CheckReport:
    """Compares, and with ``repair`` puts right what can be. ``owned`` tells the ids of the VMs
    whose processes are accounted for at that moment."""
    data = environment.data
    processes = await asyncio.to_thread(orphans.marked_processes, data)
    files = await asyncio.to_thread(_files, data)
    records = await _Records.read(environment.store)
    accounted = owned() | records.templates
    strays = {pid: owner for pid, owner in processes.items() if owner not in accounted}
    findings = await asyncio.to_thread(
        lambda: [
            *_processes(environment, strays, repair),
            *_stray_files(files, records, repair),
            *_missing_files(environment, records),
        ]
    )
    findings = [finding for finding in findings if await _still(environment, finding)]
    findings += await _records(environment, records, repair)
    return CheckReport(
        findings=tuple(findings),
        checked={
            "vms": len(records.vms),
            "volumes": len(records.volumes),
            "images": len(records.images),
        },
    )


async def _still(environment: Environment, finding: CheckFinding) -> bool:
    """Whether what is missing is still wanted: it may have been removed since the records were
    read."""
    if finding.code == "missing-volume" and finding.object is not None:
        name = finding.object.removeprefix("volume ")
        return await environment.store.resolve(scope("volume"), name) is not None
    if finding.code == "damaged-image" and finding.path is not None:
        digest = Path(finding.path).parent.name
        images = (await environment.store.list(Image)).items
        return any(image.record.status.digest == digest for image in images)
    return True


def _files(data: Path) -> dict[str, list[Path]]:
    """What lies in the directories that records account for."""
    old = time.time() - GRACE
    return {
        "a VM's directory": _entries(data / "vms"),
        "a VM's sockets": _entries(data / "run" / "vms"),
        "a layer of a volume": _entries(data / "volumes"),
        "a template": _entries(data / "templates"),
        "an export": _entries(data / "exports"),
        "an image": _entries(data / "images"),
        "something half-made": [p for p in _entries(data / "tmp") if _changed(p) < old],
    }


def _processes(
    environment: Environment, strays: dict[int, str], repair: bool
) -> Iterator[CheckFinding]:
    living = orphans.marked_processes(environment.data)
    strays = {pid: vm for pid, vm in strays.items() if living.get(pid) == vm}
    ended = set(orphans.end_processes(environment.data, set(strays))) if repair else set()
    for pid, vm in strays.items():
        yield CheckFinding(
            code="orphan-process",
            message=f"process {pid} runs {vm} but nobody owns it",
            object=vm,
            repaired=pid in ended,
        )


def _stray_files(
    files: dict[str, list[Path]], records: _Records, repair: bool
) -> Iterator[CheckFinding]:
    digests = {image.status.digest for image in records.images.values()}
    making = any(image.status.state is ImageState.PENDING for image in records.images.values())
    accounted: dict[str, Callable[[Path], bool]] = {
        "a VM's directory": lambda path: path.name in records.vms,
        "a VM's sockets": lambda path: path.name in records.vms,
        "a layer of a volume": lambda path: path.name.rpartition(".")[0] in records.layers,
        "a template": lambda path: path.name in records.templates,
        "an export": lambda path: path.name in records.exports,
        "an image": lambda path: making or path.name in digests,
        "something half-made": lambda path: making,
    }
    for what, paths in files.items():
        for path in paths:
            if accounted[what](path) or not _there(path):
                continue
            if repair:
                remove_tree(path)
            yield CheckFinding(
                code="stray-file",
                message=f"{path} looks like {what}, but no record accounts for it",
                path=str(path),
                repaired=repair and not _there(path),
            )


def _missing_files(environment: Environment, records: _Records) -> Iterator[CheckFinding]:
    """What is gone cannot be made up; the finding says so."""
    busy = {
        id
        for id, vm in records.vms.items()
        if vm.record.tasks or vm.record.status.state is VMState.CREATING
    }
    for id, found in records.volumes.items():
        volume = found.record
        head = records.layers.get(volume.status.head)
        if head is None and volume.status.head:
            continue  # croft volume check has more to say
        if head is not None and head.spec.datastore is not None:
            continue  # likewise
        path = environment.directory.volumes / (
            file_name(head) if head is not None else f"{id}.qcow2"
        )
        making = volume.spec.vm is None and volume.status.state is VolumeState.PENDING
        if volume.spec.user not in busy and not volume.tasks and not making and not path.exists():
            yield CheckFinding(
                code="missing-volume",
                message=f"the file of {volume.label} is gone: restore it from a backup",
                object=volume.label,
                path=str(path),
            )
    for image in records.images.values():
        if image.status.state is not ImageState.READY or image.status.content is None:
            continue
        directory = environment.data / "images" / str(image.status.digest)
        for name, file in image.status.content.files.items():
            path = directory / name
            if _size(path) != file.size:
                yield CheckFinding(
                    code="damaged-image",
                    message=f"{image.label} is damaged: {name} is gone or has another size",
                    object=image.label,
                    path=str(path),
                )


async def _records(environment: Environment, records: _Records, repair: bool) -> list[CheckFinding]:
    findings = []
    for volume in records.volumes.values():
        if volume.record.spec.vm is not None and volume.record.spec.vm not in records.vms:
            findings += await _ownerless(environment, volume, repair)
    for vm in records.vms.values():
        findings += await _names(environment, vm, records, repair)
        lost = {task for task in vm.record.tasks if task not in records.tasks}
        if lost:
            findings.append(await _lost_tasks(environment, vm.record, lost, repair))
    return findings


async def _ownerless(
    environment: Environment, volume: Versioned[Volume], repair: bool
) -> list[CheckFinding]:
    record = volume.record
    id = record.meta.id
    if repair:
        try:
            await environment.store.transact(
                Transaction(
                    checks=[Check(Volume, id, volume.revision), Check(VM, str(record.spec.vm), 0)],
                    deletes=[Delete(Volume, id)],
                    releases=[Release(scope("volume"), record.meta.name, id)],
                )
            )
        except StaleError:
            return []  # it was seen to meanwhile
        await collect_layers(environment)
    return [
        CheckFinding(
            code="ownerless-volume",
            message=f"{record.label} belongs to a VM that is gone",
            object=record.label,
            repaired=repair,
        )
    ]


async def _lost_tasks(
    environment: Environment, vm: VM, lost: set[str], repair: bool
) -> CheckFinding:
    if repair:
        await write(
            environment,
            VM,
            vm.meta.id,
            lambda record: msgspec.structs.replace(
                record, tasks=tuple(task for task in record.tasks if task not in lost)
            ),
        )
    return CheckFinding(
        code="lost-task",
        message=f"{vm.label} waits for {len(lost)} tasks that are gone",
        object=vm.label,
        repaired=repair,
    )


async def _names(
    environment: Environment, vm: Versioned[VM], records: _Records, repair: bool
) -> list[CheckFinding]:
    record = vm.record
    own = [records.volumes[d.volume] for d in record.spec.disks if d.volume in records.volumes]
    checks = [
        Check(VM, record.meta.id, vm.revision),
        *(Check(Volume, volume.record.meta.id, volume.revision) for volume in own),
    ]
    findings: list[CheckFinding] = []
    for held in removal_releases(record, [volume.record for volume in own]):
        holder = await environment.store.resolve(held.scope, held.name)
        if holder == held.id:
            continue
        claims = [Claim(held.scope, held.name, held.id)] if repair and holder is None else []
        try:
            await environment.store.transact(Transaction(checks=checks, claims=claims))
        except (StaleError, AlreadyExistsError):
            return findings  # it was renamed or removed meanwhile
        findings.append(
            CheckFinding(
                code="lost-name",
                message=f"{record.label} does not hold its name {held.name}",
                object=record.label,
                repaired=bool(claims),
            )
        )
    return findings


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _there(path: Path) -> bool:
    return os.path.lexists(path)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return math.inf


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
