"""``croft volume check`` names what nobody accounts for beside the layers, and what is gone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.unit.host.rig import Rig
from undercroft.host.leftovers import GRACE, check_leftovers
from undercroft.model.base import Meta
from undercroft.model.requests import CheckFinding
from undercroft.model.snapshot import Snapshot, SnapshotSpec, SnapshotState, SnapshotStatus
from undercroft.model.template import Template, TemplateSpec, TemplateState, TemplateStatus
from undercroft.model.units import GiB
from undercroft.model.vm import VM
from undercroft.store.interface import Put, Transaction

OLD = time.time() - GRACE - 60


async def healthy(rig: Rig) -> VM:
    """A VM with a snapshot that has memory, and a template that has, too."""
    await rig.close()
    environment = rig.environment
    vm: VM = await rig.world.created("web1", disk=GiB)
    snapshot = Snapshot(
        meta=Meta(id="snap-0000000000000001", name="one", created=1.0),
        spec=SnapshotSpec(vm=vm.meta.id, memory=True),
        status=SnapshotStatus(state=SnapshotState.READY, memory=4),
    )
    template = Template(
        meta=Meta(id="tpl-0000000000000001", name="warm", created=1.0),
        spec=TemplateSpec(host=environment.host, source=vm.meta.id, memory=True),
        status=TemplateStatus(state=TemplateState.READY, memory=4),
    )
    await rig.store.transact(Transaction(puts=[Put(snapshot), Put(template)]))
    directory = environment.snapshot_directory(snapshot)
    directory.mkdir(parents=True)
    (directory / "memory").write_bytes(b"four")
    memory = environment.template_directory(template.meta.id) / "memory"
    memory.mkdir(parents=True)
    for name in ("ram", "devices"):
        (memory / name).write_bytes(b"four")
    assert await check_leftovers(environment, False) == []
    return vm


async def look(rig: Rig, repair: bool = False) -> list[CheckFinding]:
    return await check_leftovers(rig.environment, repair)


@pytest.mark.parametrize(
    ("name", "age"),
    [
        ("vms/{vm}/snapshots/snap-0000000000000002/memory", 0),
        ("vms/{vm}/snapshots/snap-0000000000000001/memory.part", 1),
        ("vms/{vm}/suspend.state.part", 1),
        ("vms/{vm}/.seed.iso-0123abcd", 1),
        ("keys/layer-0000000000000009", 0),
        ("keys/half-0123456789abcdef", 1),
        ("keys/layer-0000000000000009.half", 1),
        ("templates/tpl-0000000000000001/memory/work/devices", 0),
    ],
)
async def test_what_nobody_accounts_for(rig: Rig, name: str, age: int) -> None:
    vm = await healthy(rig)
    path = rig.environment.data / name.format(vm=vm.meta.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    if age:
        assert await look(rig, repair=True) == [], "it may be in work"
        os.utime(path, (OLD, OLD))
    (finding,) = await look(rig)
    assert (finding.code, finding.repaired) == ("stray-file", False)
    assert path.is_relative_to(str(finding.path))
    (finding,) = await look(rig, repair=True)
    assert finding.repaired
    assert not Path(str(finding.path)).exists()
    assert await look(rig) == []


@pytest.mark.parametrize("there", [0, 3])
async def test_memory_that_is_gone(rig: Rig, there: int) -> None:
    vm = await healthy(rig)
    memory = rig.environment.vm_directory(vm.meta.id) / "snapshots/snap-0000000000000001/memory"
    memory.write_bytes(b"fou"[:there])
    (finding,) = await look(rig, repair=True)
    assert (finding.code, finding.object) == ("missing-memory", "snapshot one")
    assert not finding.repaired


async def test_a_template_without_its_memory(rig: Rig) -> None:
    await healthy(rig)
    (rig.environment.data / "templates/tpl-0000000000000001/memory/ram").unlink()
    (finding,) = await look(rig, repair=True)
    assert (finding.code, finding.object) == ("missing-memory", "template warm")
