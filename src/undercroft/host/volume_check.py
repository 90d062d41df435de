"""``croft volume check``: leaks and damage in what the disks of VMs are kept in."""

from __future__ import annotations

import asyncio
from pathlib import Path

from undercroft.host.datastores import driver_of, layer_file
from undercroft.host.environment import Environment
from undercroft.host.layers import Uses, collect_layers
from undercroft.host.leftovers import check_leftovers
from undercroft.model.datastore import Datastore
from undercroft.model.errors import DataError, UnavailableError
from undercroft.model.image import Image
from undercroft.model.layer import Layer, LayerFormat, LayerState
from undercroft.model.requests import CheckFinding, CheckReport
from undercroft.model.vm import VM
from undercroft.model.volume import Volume, VolumeState
from undercroft.storage.volumes import check_volume
from undercroft.store.interface import Delete, Release, Transaction


async def check_volumes(environment: Environment, repair: bool) -> CheckReport:
    """Holds files against records and looks into the files; with ``repair`` removes what nobody
    accounts for and gives leaked clusters back. What is gone, or corrupt, cannot be made up: the
    finding says which volumes, snapshots and templates that concerns."""
    files, findings = await _files(environment)  # before the records: see check.py
    store = environment.store
    uses = await Uses.read(environment)
    volumes = [item.record for item in (await store.list(Volume)).items]
    vms = {item.record.meta.id: item.record for item in (await store.list(VM)).items}
    images = {item.record.meta.id for item in (await store.list(Image)).items}
    for path in files:
        if path.name.rpartition(".")[0] not in uses.layers and path.exists():
            findings.append(await _leaked(path, repair))
    leaked = [layer for layer in uses.unneeded() if layer.status.state is LayerState.READY]
    if leaked and repair:
        await collect_layers(environment)
    findings += [
        CheckFinding(
            code="leaked-layer",
            message=f"nobody needs {layer.meta.id}",
            object=f"layer {layer.meta.id}",
            repaired=repair,
        )
        for layer in leaked
    ]
    gone = {layer.meta.id for layer in leaked} if repair else set()
    busy = _busy(uses, volumes, vms)
    for layer in uses.layers.values():
        id = layer.meta.id
        if layer.status.state is not LayerState.READY or id in gone:
            continue
        findings += _beneath(layer, uses, images, volumes)
        try:
            path = await layer_file(environment, layer)
        except (UnavailableError, DataError):
            continue  # it has been told of already
        if not path.exists():
            if await store.get(Layer, id) is not None:
                what = f"the file of {id} is gone: {_concerns(uses, id, volumes)}"
                findings.append(_finding("missing-layer", what, id, path))
        elif layer.spec.encrypted and not environment.keys.path(id).exists():
            what = f"the key of {id} is gone: {_concerns(uses, id, volumes)}"
            findings.append(_finding("missing-key", what, id, environment.keys.path(id)))
        elif id not in busy and layer.spec.format is LayerFormat.QCOW2:
            key = environment.keys.path(id) if layer.spec.encrypted else None
            findings += await _inside(path, key, id, uses, volumes, repair)
    for volume in volumes:
        if volume.spec.vm is not None and volume.spec.vm not in vms:
            findings.append(await _ownerless(environment, volume, repair))
        elif volume.status.state is VolumeState.READY and volume.status.head not in uses.layers:
            what = f"{volume.label} has lost the record of what is on it"
            findings.append(CheckFinding(code="missing-layer", message=what, object=volume.label))
    findings += await check_leftovers(environment, repair)
    return CheckReport(
        findings=tuple(findings), checked={"volumes": len(volumes), "layers": len(uses.layers)}
    )


async def _files(environment: Environment) -> tuple[list[Path], list[CheckFinding]]:
    """The files of layers in all datastores, and the datastores that are not there."""
    files: list[Path] = []
    findings = []
    for item in (await environment.store.list(Datastore)).items:
        datastore = item.record
        place = driver_of(environment, datastore)
        try:
            files += [place.path(name) for name in await place.names()]
        except (UnavailableError, OSError) as error:
            what = error.message if isinstance(error, UnavailableError) else str(error)
            findings.append(
                CheckFinding(
                    code="datastore-unavailable",
                    message=what,
                    object=datastore.label,
                    path=datastore.spec.path,
                )
            )
    return files, findings


def _finding(code: str, message: str, layer: str, path: Path) -> CheckFinding:
    return CheckFinding(code=code, message=message, object=f"layer {layer}", path=str(path))


async def _leaked(path: Path, repair: bool) -> CheckFinding:
    if repair:
        await asyncio.to_thread(path.unlink, missing_ok=True)
    return CheckFinding(
        code="leaked-file",
        message=f"{path.name} looks like a layer of a volume, but no record accounts for it",
        path=str(path),
        repaired=repair,
    )


def _busy(uses: Uses, volumes: list[Volume], vms: dict[str, VM]) -> set[str]:
    """The layers that a QEMU may be writing to, or a task changing."""
    found = set()
    for volume in volumes:
        vm = vms.get(volume.spec.user or "")
        if volume.tasks or (vm is not None and (vm.status.state.alive or vm.tasks)):
            at: str | None = volume.status.head
            while at is not None and at in uses.layers:
                found.add(at)
                at = uses.layers[at].spec.parent
    return found


def _concerns(uses: Uses, layer: str, volumes: list[Volume]) -> str:
    heads = uses.heads_above(layer)
    names = sorted(volume.label for volume in volumes if volume.status.head in heads)
    if names:
        return f"restore {', '.join(names)} from a backup"
    return "a snapshot or template that needs it cannot be used any more"


def _beneath(
    layer: Layer, uses: Uses, images: set[str], volumes: list[Volume]
) -> list[CheckFinding]:
    parent, image = layer.spec.parent, layer.spec.image
    missing = None
    if parent is not None and parent not in uses.layers:
        missing = f"layer {parent}"
    elif parent is None and image is not None and image not in images:
        missing = f"image {image}"
    if missing is None:
        return []
    concerned = _concerns(uses, layer.meta.id, volumes)
    return [
        CheckFinding(
            code="missing-lower-layer",
            message=f"{missing}, which {layer.meta.id} lies on, is gone: {concerned}",
            object=f"layer {layer.meta.id}",
        )
    ]


async def _inside(
    path: Path, key: Path | None, id: str, uses: Uses, volumes: list[Volume], repair: bool
) -> list[CheckFinding]:
    found = []
    for problem in await check_volume(path, key=key):
        leak = "leaked" in problem
        if leak and repair:
            left = await check_volume(path, key=key, repair=True)
            found.append(
                CheckFinding(
                    code="leaked-clusters",
                    message=problem,
                    object=f"layer {id}",
                    path=str(path),
                    repaired=not left,
                )
            )
        elif leak:
            found.append(_finding("leaked-clusters", problem, id, path))
        else:
            what = f"{problem}: {_concerns(uses, id, volumes)}"
            found.append(_finding("corrupt-layer", what, id, path))
    return found


async def _ownerless(environment: Environment, volume: Volume, repair: bool) -> CheckFinding:
    id = volume.meta.id
    if repair:
        await environment.store.transact(
            Transaction(
                deletes=[Delete(Volume, id)],
                releases=[Release(f"volume/{volume.meta.project}", volume.meta.name, id)],
            )
        )
        await collect_layers(environment)
    return CheckFinding(
        code="ownerless-volume",
        message=f"{volume.label} belongs to a VM that is gone",
        object=volume.label,
        repaired=repair,
    )
