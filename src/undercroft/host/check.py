"""``croft host check``: holds what is on disk and in the process table against the store.

A running daemon cleans up after itself, and a starting one after its predecessor; this finds what
is left all the same, says so, and removes or records it on request. It never touches anything
that a record accounts for, and nothing outside the data directory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

from undercroft.host import orphans
from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.model.image import Image, ImageState
from undercroft.model.requests import CheckFinding, CheckReport
from undercroft.model.task import Task
from undercroft.model.vm import VM, VMState
from undercroft.model.volume import Volume
from undercroft.operations.context import scope
from undercroft.operations.vm_change import removal_releases
from undercroft.store.interface import Claim, Delete, Release, Transaction

GRACE = 3600.0  # seconds that a file in DATA/tmp may be older than and still be in use


async def check_host(environment: Environment, owned: set[str], repair: bool) -> CheckReport:
    """Compares, and with ``repair`` puts right what can be. ``owned``: ids of the VMs whose
    processes are accounted for."""
    store = environment.store
    vms = {i.record.meta.id: i.record for i in (await store.list(VM)).items}
    volumes = {i.record.meta.id: i.record for i in (await store.list(Volume)).items}
    images = {i.record.meta.id: i.record for i in (await store.list(Image)).items}
    tasks = {i.record.meta.id for i in (await store.list(Task)).items}
    findings = await asyncio.to_thread(
        lambda: [
            *_processes(environment, owned, repair),
            *_stray_files(environment, vms, volumes, images, repair),
            *_missing_files(environment, vms, volumes, images),
        ]
    )
    findings += await _records(environment, vms, volumes, tasks, repair)
    return CheckReport(
        findings=tuple(findings),
        checked={"vms": len(vms), "volumes": len(volumes), "images": len(images)},
    )


def _processes(environment: Environment, owned: set[str], repair: bool) -> Iterator[CheckFinding]:
    strays = orphans.strays(environment.data, owned)
    ended = set(orphans.end_processes(environment.data, set(strays))) if repair else set()
    for pid, vm in strays.items():
        yield CheckFinding(
            code="orphan-process",
            message=f"process {pid} runs {vm} but nobody owns it",
            object=vm,
            repaired=pid in ended,
        )


def _stray_files(
    environment: Environment,
    vms: dict[str, VM],
    volumes: dict[str, Volume],
    images: dict[str, Image],
    repair: bool,
) -> Iterator[CheckFinding]:
    data = environment.data
    digests = {image.status.digest for image in images.values()}
    making = any(image.status.state is ImageState.PENDING for image in images.values())
    strays: list[tuple[Path, str]] = []
    strays += [(p, "a VM's directory") for p in _entries(data / "vms") if p.name not in vms]
    strays += [(p, "a VM's sockets") for p in _entries(data / "run" / "vms") if p.name not in vms]
    strays += [
        (p, "a volume")
        for p in _entries(data / "volumes")
        if p.name.removesuffix(".qcow2") not in volumes
    ]
    if not making:
        strays += [(p, "an image") for p in _entries(data / "images") if p.name not in digests]
    old = time.time() - GRACE
    strays += [
        (p, "something half-made") for p in _entries(data / "tmp") if p.lstat().st_mtime < old
    ]
    for path, what in strays:
        if repair:
            remove_tree(path)
        yield CheckFinding(
            code="stray-file",
            message=f"{path} looks like {what}, but no record accounts for it",
            path=str(path),
            repaired=repair and not path.exists(),
        )


def _missing_files(
    environment: Environment,
    vms: dict[str, VM],
    volumes: dict[str, Volume],
    images: dict[str, Image],
) -> Iterator[CheckFinding]:
    """What is gone cannot be made up; the finding says so."""
    busy = {id for id, vm in vms.items() if vm.tasks or vm.status.state is VMState.CREATING}
    for id, volume in volumes.items():
        path = environment.volume_path(id)
        if volume.spec.vm not in busy and not path.exists():
            yield CheckFinding(
                code="missing-volume",
                message=f"the file of {volume.label} is gone: restore it from a backup",
                object=volume.label,
                path=str(path),
            )
    for image in images.values():
        if image.status.state is not ImageState.READY or image.status.content is None:
            continue
        directory = environment.data / "images" / str(image.status.digest)
        for name, file in image.status.content.files.items():
            path = directory / name
            if not path.exists() or path.stat().st_size != file.size:
                yield CheckFinding(
                    code="damaged-image",
                    message=f"{image.label} is damaged: {name} is gone or has another size",
                    object=image.label,
                    path=str(path),
                )


async def _records(
    environment: Environment,
    vms: dict[str, VM],
    volumes: dict[str, Volume],
    tasks: set[str],
    repair: bool,
) -> list[CheckFinding]:
    findings = []
    for volume in volumes.values():
        if volume.spec.vm is not None and volume.spec.vm not in vms:
            if repair:
                environment.volume_path(volume.meta.id).unlink(missing_ok=True)
                await environment.store.transact(
                    Transaction(
                        deletes=[Delete(Volume, volume.meta.id)],
                        releases=[Release(scope("volume"), volume.meta.name, volume.meta.id)],
                    )
                )
            findings.append(
                CheckFinding(
                    code="ownerless-volume",
                    message=f"{volume.label} belongs to a VM that is gone",
                    object=volume.label,
                    repaired=repair,
                )
            )
    for vm in vms.values():
        findings += await _names(environment, vm, volumes, repair)
        lost = [task for task in vm.tasks if task not in tasks]
        if lost:
            findings.append(
                CheckFinding(
                    code="lost-task",
                    message=f"{vm.label} waits for {len(lost)} tasks that are gone",
                    object=vm.label,
                    repaired=False,
                )
            )
    return findings


async def _names(
    environment: Environment, vm: VM, volumes: dict[str, Volume], repair: bool
) -> list[CheckFinding]:
    own = [volumes[d.volume] for d in vm.spec.disks if d.volume in volumes]
    findings = []
    for held in removal_releases(vm, own):
        holder = await environment.store.resolve(held.scope, held.name)
        if holder == held.id:
            continue
        if repair and holder is None:
            await environment.store.transact(
                Transaction(claims=[Claim(held.scope, held.name, held.id)])
            )
        findings.append(
            CheckFinding(
                code="lost-name",
                message=f"{vm.label} does not hold its name {held.name}",
                object=vm.label,
                repaired=repair and holder is None,
            )
        )
    return findings


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
