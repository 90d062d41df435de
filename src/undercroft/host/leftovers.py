"""What ``croft volume check`` says of that which belongs to disks besides their layers: the memory
of snapshots and templates, keys, and what was begun and never finished."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from pathlib import Path

from undercroft.host.datastores import driver_of
from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.host.snapshot_files import memory_size
from undercroft.hypervisor.fork import WORK, frozen, frozen_size
from undercroft.model.datastore import Datastore
from undercroft.model.errors import UnavailableError
from undercroft.model.layer import Layer
from undercroft.model.requests import CheckFinding
from undercroft.model.snapshot import Snapshot, SnapshotState
from undercroft.model.template import Template, TemplateState
from undercroft.model.volume import Volume
from undercroft.storage.datastores.directory import HALF

GRACE = 3600.0  # seconds for which something half-made may be untouched, and still be in work


async def check_leftovers(environment: Environment, repair: bool) -> list[CheckFinding]:
    """Finds what nobody accounts for, and with ``repair`` removes it; and what is gone."""
    halves = await _halves(environment)
    stray = await asyncio.to_thread(_stray, environment, halves)
    # The records after the files, so that what came to be in between is not taken for a leak.
    store = environment.store
    snapshots = {i.record.meta.id: i.record for i in (await store.list(Snapshot)).items}
    templates = {i.record.meta.id: i.record for i in (await store.list(Template)).items}
    layers = {item.record.meta.id for item in (await store.list(Layer)).items}
    busy = any(item.record.tasks for item in (await store.list(Volume)).items)
    findings = []
    for what, path in stray:
        if what == _MEMORY:
            accounted = path.name in snapshots
        elif what == _KEY:
            accounted = busy or path.name in layers
        else:
            accounted = what == _FORKING and not _ready(templates.get(path.parent.parent.name))
        if accounted or not path.exists():
            continue
        if repair:
            await asyncio.to_thread(remove_tree, path)
        findings.append(
            CheckFinding(
                code="stray-file",
                message=f"{path} looks like {what}, but no record accounts for it",
                path=str(path),
                repaired=repair and not path.exists(),
            )
        )
    gone = await asyncio.to_thread(lambda: list(_gone(environment, snapshots, templates)))
    for finding, kind, id in gone:
        if await store.get(kind, id) is not None:  # else it was removed meanwhile
            findings.append(finding)
    return findings


_MEMORY = "the memory of a snapshot"
_KEY = "the key of a layer"
_FORKING = "what a template's memory was made with"
_HALF = "something half-made"


async def _halves(environment: Environment) -> list[Path]:
    """Where disks are while they are made, in all datastores that are there."""
    found = []
    for item in (await environment.store.list(Datastore)).items:
        spec = item.record.spec
        try:
            await driver_of(environment, item.record).check()
        except (UnavailableError, OSError):
            continue  # it has been told of already
        if not spec.builtin:
            found.append(Path(spec.path) / HALF)
    return found


def _stray(environment: Environment, halves: list[Path]) -> list[tuple[str, Path]]:
    """What may be a leak: what it looks like, and its path."""
    data, old = environment.data, time.time() - GRACE
    parts = [path for half in halves for path in half.glob("*")]
    for pattern in (
        "vms/*/*.part",
        "vms/*/.*-????????",
        "vms/*/snapshots/*/*.part",
        "templates/*/*/*.part",
        "keys/*.half",
    ):
        parts += data.glob(pattern)
    found = [(_MEMORY, path) for path in data.glob("vms/*/snapshots/*")]
    for name in environment.keys.known():
        path = environment.keys.path(name)
        if name.startswith("layer-") or _touched(path) < old:
            found.append((_KEY, path))
    found += [(_FORKING, path) for path in data.glob(f"templates/*/*/{WORK}")]
    found += [(_HALF, path) for path in parts if _touched(path) < old]
    return found


def _touched(path: Path) -> float:
    """When a file, or what is in a directory, was last changed."""
    try:
        inner = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
        return max((entry.lstat().st_mtime for entry in (path, *inner)), default=math.inf)
    except OSError:
        return math.inf


def _ready(template: Template | None) -> bool:
    return template is not None and template.status.state is TemplateState.READY


def _gone(
    environment: Environment, snapshots: dict[str, Snapshot], templates: dict[str, Template]
) -> Iterator[tuple[CheckFinding, type[Snapshot] | type[Template], str]]:
    for id, snapshot in snapshots.items():
        directory = environment.snapshot_directory(snapshot)
        if snapshot.status.state is not SnapshotState.READY:
            continue
        if snapshot.status.memory and memory_size(directory) < snapshot.status.memory:
            what = f"the memory of {snapshot.label} is gone, or not whole"
            advice = "its disks are there: clone or export it, or forget it"
        elif not directory.is_dir():
            what = f"what belongs to {snapshot.label} besides its disks is gone"
            advice = "forget it"
        else:
            continue
        yield _missing(f"{what}: {advice}", snapshot, directory), Snapshot, id
    for id, template in templates.items():
        directory = environment.template_directory(id) / "memory"
        if not _ready(template) or not template.status.memory:
            continue
        if not frozen(directory) or not frozen_size(directory):
            told = f"the memory of {template.label} is gone: make it again"
            yield _missing(told, template, directory), Template, id


def _missing(message: str, record: Snapshot | Template, path: Path) -> CheckFinding:
    return CheckFinding(code="missing-memory", message=message, object=record.label, path=str(path))
