"""Going back without room for what there was."""

from __future__ import annotations

import pytest

from tests.unit.host.acting import running
from tests.unit.host.rig import Rig
from tests.unit.host.test_snapshots import ask, full
from undercroft.hypervisor.machine import RunState
from undercroft.model.errors import NoSpaceError
from undercroft.model.layer import Layer
from undercroft.model.requests import RevertRequest, SnapshotCreate
from undercroft.model.task import TaskState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM


async def test_no_room_for_the_settings_leaves_the_vm_as_it_was(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are copied before anything is given up for them."""
    machine = await running(rig)
    vm = await rig.world.vm("web1")
    directory = rig.environment.vm_directory(vm.meta.id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "nvram.fd").write_bytes(b"then")
    await rig.final(await ask(rig, SnapshotCreate(name="one")))
    (directory / "nvram.fd").write_bytes(b"now")
    volumes = await rig.world.all(Volume)
    request = RevertRequest(force=True)
    monkeypatch.setattr("undercroft.host.snapshot_files.shutil.copy2", full)
    task = await rig.world.operations.snapshots.revert(SYSTEM, "web1", "one", request)
    failed = await rig.final(task)
    assert failed.status.error is not None
    assert failed.status.error.code == NoSpaceError.code
    assert machine.run_state is RunState.RUNNING
    assert (directory / "nvram.fd").read_bytes() == b"now"
    assert await rig.world.all(Volume) == volumes
    assert sorted(path.name for path in directory.iterdir()) == ["nvram.fd", "snapshots"]
    files = {path.stem for path in rig.environment.directory.volumes.iterdir()}
    assert files == {layer.meta.id for layer in await rig.world.all(Layer)}
    assert len(files) == 2
    monkeypatch.undo()
    task = await rig.world.operations.snapshots.revert(SYSTEM, "web1", "one", request)
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert (directory / "nvram.fd").read_bytes() == b"then"
    assert not (directory / "coming-back").exists()
