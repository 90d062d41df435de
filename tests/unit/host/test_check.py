"""``croft host check``: finds and repairs each kind of thing, and takes nothing for stray that is
only just coming or going."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.host.emulators import emulators
from tests.unit.host.rig import Rig
from tests.unit.operations.world import HOST
from undercroft.host import check as check_module
from undercroft.host.check import GRACE, check_host
from undercroft.model.image import Image, ImageFile, ImageState
from undercroft.model.layer import Layer
from undercroft.model.requests import CheckFinding
from undercroft.model.units import GiB
from undercroft.model.vm import VM, Forward
from undercroft.model.volume import Volume
from undercroft.operations.context import scope
from undercroft.store.interface import Delete, Put, Release, Transaction


async def healthy(rig: Rig) -> VM:
    """A VM with all that belongs to it."""
    await rig.close()
    vm = await rig.world.created(
        "web1", disk=GiB, forwards=(Forward(guest_port=1, host_port=8080),)
    )
    environment = rig.environment
    environment.vm_directory(vm.meta.id).mkdir(parents=True)
    environment.run_directory(vm.meta.id).mkdir(parents=True)
    (await rig.disk(vm)).write_bytes(b"volume")
    return vm


async def look(rig: Rig, repair: bool = False, owned: set[str] | None = None) -> list[CheckFinding]:
    report = await check_host(rig.environment, lambda: owned or set(), repair)
    return list(report.findings)


async def found_and_repaired(rig: Rig, code: str, count: int = 1) -> list[CheckFinding]:
    """It is found without being touched, then repaired, and then gone."""
    before = await rig.store.revision()
    findings = await look(rig)
    assert [finding.code for finding in findings] == [code] * count
    assert not any(finding.repaired for finding in findings)
    assert await rig.store.revision() == before
    repaired = await look(rig, repair=True)
    assert [finding.code for finding in repaired] == [code] * count
    assert all(finding.repaired for finding in repaired)
    assert await look(rig) == []
    return findings


async def test_a_healthy_host(rig: Rig) -> None:
    vm = await healthy(rig)
    report = await check_host(rig.environment, set, True)
    assert report.findings == ()
    assert report.checked == {"vms": 1, "volumes": 1, "images": 0}
    assert (await rig.disk(vm)).exists()


@pytest.mark.parametrize(
    "name",
    [
        "vms/vm-0000000000000000",
        "run/vms/vm-0000000000000000",
        "volumes/vol-0000000000000000.qcow2",
        "volumes/notes.txt",
        "images/" + "cd" * 32,
    ],
)
async def test_stray_files(rig: Rig, name: str) -> None:
    await healthy(rig)
    path = rig.environment.data / name
    if path.suffix:
        path.write_bytes(b"x")
    else:
        path.mkdir(parents=True)
        (path / "inner").write_bytes(b"x")
    (finding,) = await found_and_repaired(rig, "stray-file")
    assert finding.path == str(path)
    assert not path.exists()


async def test_a_stray_link_is_removed_and_not_followed(rig: Rig, tmp_path: Path) -> None:
    await healthy(rig)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"x")
    (rig.environment.data / "vms" / "vm-0000000000000000").symlink_to(precious)
    await found_and_repaired(rig, "stray-file")
    assert (precious / "file").exists()


async def test_old_half_made_things(rig: Rig) -> None:
    await healthy(rig)
    old, new = rig.environment.tmp / "old", rig.environment.tmp / "new"
    old.touch()
    new.touch()
    past = time.time() - GRACE - 60
    os.utime(old, (past, past))
    await found_and_repaired(rig, "stray-file")
    assert new.exists()
    assert not old.exists()


async def test_while_an_image_is_made_its_things_are_left_alone(rig: Rig) -> None:
    await healthy(rig)
    await rig.world.image("half", state=ImageState.PENDING)
    directory = rig.environment.data / "images" / ("cd" * 32)
    directory.mkdir()
    work = rig.environment.tmp / "work"
    work.mkdir()
    past = time.time() - GRACE - 60
    os.utime(work, (past, past))
    assert await look(rig, repair=True) == []
    assert directory.exists()
    assert work.exists()


async def test_a_missing_volume_cannot_be_repaired(rig: Rig) -> None:
    vm = await healthy(rig)
    (await rig.disk(vm)).unlink()
    (finding,) = await look(rig, repair=True)
    assert (finding.code, finding.repaired) == ("missing-volume", False)
    assert finding.object == "volume web1-boot"


async def test_a_volume_that_is_just_being_made_is_not_missing(rig: Rig) -> None:
    await healthy(rig)
    from tests.unit.operations.test_create import create

    await create(rig.world, name="web2", disk=GiB)
    assert await look(rig, repair=True) == []


async def test_damaged_images(rig: Rig) -> None:
    await healthy(rig)
    files = {"disk.qcow2": ImageFile(size=4, sha256="0" * 64)}
    await rig.world.image("debian:12", files=files)
    directory = rig.environment.data / "images" / ("ab" * 32)
    directory.mkdir()
    (finding,) = await look(rig, repair=True)
    assert (finding.code, finding.repaired) == ("damaged-image", False)
    (directory / "disk.qcow2").write_bytes(b"12345")
    assert [f.code for f in await look(rig)] == ["damaged-image"]
    (directory / "disk.qcow2").write_bytes(b"1234")
    assert await look(rig) == []


async def test_an_ownerless_volume(rig: Rig) -> None:
    vm = await healthy(rig)
    disk = await rig.disk(vm)
    other = await rig.world.created("web2")
    await rig.store.transact(
        Transaction(
            deletes=[Delete(VM, vm.meta.id)],
            releases=[
                Release(scope("vm"), "web1", vm.meta.id),
                Release(f"port/{HOST}", "tcp/8080", vm.meta.id),
            ],
        )
    )
    for path in (
        rig.environment.vm_directory(vm.meta.id),
        rig.environment.run_directory(vm.meta.id),
    ):
        path.rmdir()
    await found_and_repaired(rig, "ownerless-volume")
    assert not disk.exists()
    assert await rig.world.all(Layer) == []
    assert await rig.world.all(Volume) == []
    assert await rig.store.resolve(scope("volume"), "web1-boot") is None
    assert (await rig.world.vm("web2")) == other


async def test_lost_names(rig: Rig) -> None:
    vm = await healthy(rig)
    await rig.store.transact(
        Transaction(
            releases=[
                Release(scope("vm"), "web1", vm.meta.id),
                Release(scope("volume"), "web1-boot", vm.spec.disks[0].volume),
                Release(f"port/{HOST}", "tcp/8080", vm.meta.id),
            ]
        )
    )
    findings = await look(rig)
    assert [finding.code for finding in findings] == ["lost-name"] * 3
    await look(rig, repair=True)
    assert await look(rig) == []
    await rig.world.check_invariants()


async def test_a_name_that_somebody_else_holds_is_only_told(rig: Rig) -> None:
    vm = await healthy(rig)
    renamed = msgspec.structs.replace(vm, meta=msgspec.structs.replace(vm.meta, name="web2"))
    await rig.world.created("web2")
    await rig.store.transact(Transaction(puts=[Put(renamed)]))
    (finding,) = await look(rig, repair=True)
    assert (finding.code, finding.repaired) == ("lost-name", False)


async def test_lost_tasks(rig: Rig) -> None:
    vm = await healthy(rig)
    queued = msgspec.structs.replace(vm, tasks=("task-0000000000000000",))
    await rig.store.transact(Transaction(puts=[Put(queued)]))
    await found_and_repaired(rig, "lost-task")
    assert (await rig.world.vm("web1")).tasks == ()


async def test_orphan_processes(rig: Rig, tmp_path: Path) -> None:
    vm = await healthy(rig)
    with emulators(tmp_path) as lab:
        pid = lab.start(rig.environment.vm_directory(vm.meta.id))
        assert await look(rig, repair=True, owned={vm.meta.id}) == []
        assert lab.lives(pid)
        (finding,) = await found_and_repaired(rig, "orphan-process")
        assert str(pid) in finding.message
        assert not lab.lives(pid)


# -- what comes and goes meanwhile ----------------------------------------------------------


async def at_the_worst_moment(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, name: str, happen: Any
) -> list[CheckFinding]:
    """Something happens while the check is under way, just before one of its steps."""
    step = getattr(check_module, name)
    happened = False

    if name == "_Records":
        read = check_module._Records.read

        async def reading(store: Any) -> Any:
            await happen()
            return await read(store)

        monkeypatch.setattr(check_module._Records, "read", reading)
    else:

        async def stepping(*arguments: Any) -> Any:
            nonlocal happened
            if not happened:
                happened = True
                await happen()
            return await step(*arguments)

        monkeypatch.setattr(check_module, name, stepping)
    return await look(rig, repair=True)


async def test_a_vm_that_comes_to_be_meanwhile_is_spared(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await healthy(rig)

    async def create() -> None:
        vm = await rig.world.created("web2", disk=GiB)
        rig.environment.vm_directory(vm.meta.id).mkdir()
        (await rig.disk(vm)).write_bytes(b"new")

    for step in ("_Records", "_records"):
        with monkeypatch.context() as patched:
            assert await at_the_worst_moment(rig, patched, step, create) == []
        vm = await rig.world.vm("web2")
        assert rig.environment.vm_directory(vm.meta.id).exists()
        assert (await rig.disk(vm)).exists()
        await _gone(rig, vm)


async def _gone(rig: Rig, vm: VM) -> None:
    environment = rig.environment
    volume = vm.spec.disks[0].volume
    disk = await rig.disk(vm)
    disk.unlink()
    environment.vm_directory(vm.meta.id).rmdir()
    if environment.run_directory(vm.meta.id).exists():
        environment.run_directory(vm.meta.id).rmdir()
    await rig.store.transact(
        Transaction(
            deletes=[Delete(VM, vm.meta.id), Delete(Volume, volume), Delete(Layer, disk.stem)],
            releases=[
                Release(scope("vm"), vm.meta.name, vm.meta.id),
                Release(scope("volume"), f"{vm.meta.name}-boot", volume),
                Release(f"port/{HOST}", "tcp/8080", vm.meta.id),
            ],
        )
    )


@pytest.mark.parametrize("step", ["_Records", "_records"])
async def test_a_vm_that_goes_meanwhile_leaves_no_name_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    vm = await healthy(rig)

    async def remove() -> None:
        await _gone(rig, vm)

    assert await at_the_worst_moment(rig, monkeypatch, step, remove) == []
    assert await rig.store.resolve(scope("vm"), "web1") is None
    assert await rig.store.resolve(f"port/{HOST}", "tcp/8080") is None


async def test_an_image_that_goes_meanwhile_is_not_damaged(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await healthy(rig)
    files = {"disk.qcow2": ImageFile(size=4, sha256="0" * 64)}
    image = await rig.world.image("debian:12", files=files)

    async def remove() -> None:
        await rig.store.transact(Transaction(deletes=[Delete(Image, image.meta.id)]))

    assert await at_the_worst_moment(rig, monkeypatch, "_still", remove) == []
