"""How a VM gets into a repository."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from undercroft.host.environment import Environment
from undercroft.host.imaging import reported
from undercroft.host.layers import get_layer
from undercroft.host.marks import checkpoints_of
from undercroft.host.outcome import TaskRun
from undercroft.host.reading import DiskReader, with_disk
from undercroft.model.backup import Backup, BackupDisk, BackupImage, BackupKind
from undercroft.model.checkpoint import Checkpoint
from undercroft.model.errors import DataCorruptError, DataError, UndercroftError
from undercroft.model.image import Image
from undercroft.model.snapshot import Snapshot
from undercroft.model.vm import VM
from undercroft.storage.backup.repository import Repository
from undercroft.storage.backup.writing import Sink, Tally, put_disk, put_files
from undercroft.storage.files import disk_full_is_clear
from undercroft.storage.threads import Stop, in_thread

BESIDES = ("nvram.fd", "tpm")


class Backing:
    """A backup being made of an open checkpoint."""

    def __init__(
        self, environment: Environment, vm: VM, checkpoint: Checkpoint, id: str, description: str
    ) -> None:
        self.environment = environment
        self.vm = vm
        self.checkpoint = checkpoint
        self._disks: list[BackupDisk] = []
        self._reasons: list[str] = []
        self._files: Any = ()
        self._read = self._changed = 0
        self.id = id
        self.description = description

    async def put(
        self,
        sink: Sink,
        parent: Backup | None,
        since: Checkpoint | None,
        report: Callable[[float, str], None],
        where: Path,
    ) -> None:
        """Puts everything into a sink but the manifest.

        Raises:
            UndercroftError: it did not work.
        """
        disks = self.checkpoint.status.disks
        total = max(1, sum(disk.size for disk in disks))
        before = 0
        for index, disk in enumerate(disks):
            shape = self.checkpoint.status.shape
            spec = shape.disks[index] if shape is not None else None
            old = self._parent_disk(parent, since, index)
            share = (before / total, disk.size / total)

            def work(
                reader: DiskReader,
                stop: Stop,
                old: BackupDisk | None = old,
                bus: str = spec.bus.value if spec is not None else "virtio",
                read_only: bool = spec.read_only if spec is not None else False,
                share: tuple[float, float] = share,
                index: int = index,
            ) -> BackupDisk:
                phase = "reading the disk" if len(disks) == 1 else f"reading disk {index}"
                tally = Tally(stop, lambda done: report(share[0] + done * share[1], phase))
                tally.total = reader.size
                if reader.changed is None:
                    self._reasons.append(reader.why or "")
                with disk_full_is_clear("the backup", where):
                    made = put_disk(
                        sink,
                        reader,
                        tally,
                        parent=old,
                        changed=reader.changed,
                        bus=bus,
                        read_only=read_only,
                    )
                self._read += tally.read
                self._changed += tally.changed
                return made

            made = await with_disk(
                self.environment, self.vm, self.checkpoint, index, since if old else None, work
            )
            layer = await get_layer(self.environment, disk.layer)
            self._disks.append(msgspec.structs.replace(made, encrypted=layer.spec.encrypted))
            before += disk.size
        self._files = await self._put_files(sink, where)

    def _parent_disk(
        self, parent: Backup | None, since: Checkpoint | None, index: int
    ) -> BackupDisk | None:
        """What the backup before has of a disk: it may have been another one of the VM's then."""
        if parent is None:
            return None
        if since is not None:
            volume = self.checkpoint.status.disks[index].volume
            places = [n for n, one in enumerate(since.status.disks) if one.volume == volume]
            if not places:
                return None
            index = places[0]
        return parent.disks[index] if index < len(parent.disks) else None

    async def _put_files(self, sink: Sink, where: Path) -> Any:
        snapshot = await self.environment.store.get(Snapshot, self.checkpoint.status.snapshot or "")
        if snapshot is None:
            raise DataError(f"{self.checkpoint.label} was let go", object=self.vm.label)
        directory = self.environment.snapshot_directory(snapshot.record)

        def put(stop: Stop) -> Any:
            with disk_full_is_clear("the backup", where):
                return put_files(
                    sink, directory, [name for name in BESIDES if (directory / name).exists()]
                )

        return await in_thread(put)

    async def manifest(self, parent: Backup | None, full: bool, why: str, written: int) -> Backup:
        """What is written down of it."""
        kind = BackupKind.FULL
        reason = self._reasons[0] if self._reasons else why
        if parent is not None and not full:
            kind = BackupKind.COMPARED if self._reasons else BackupKind.INCREMENTAL
        shape = self.checkpoint.status.shape or self.vm.spec
        return Backup(
            id=self.id,
            vm=self.vm.meta.id,
            name=self.vm.meta.name,
            host=self.environment.host,
            created=self.checkpoint.meta.created,
            finished=self.environment.clock(),
            kind=kind,
            why=reason if kind is not BackupKind.INCREMENTAL else "",
            parent=parent.id if parent is not None else None,
            checkpoint=self.checkpoint.meta.id,
            quiesced=self.checkpoint.status.quiesced,
            running=self.checkpoint.status.running,
            description=self.description,
            shape=cast(dict[str, Any], msgspec.to_builtins(shape)),
            image=await self._image(shape.image),
            disks=tuple(self._disks),
            files=self._files,
            read=self._read,
            written=written,
            changed=self._changed,
        )

    async def _image(self, id: str | None) -> BackupImage | None:
        found = await self.environment.store.get(Image, id) if id is not None else None
        if found is None or found.record.status.digest is None:
            return None
        return BackupImage(name=found.record.meta.name, digest=found.record.status.digest)


async def back_up(environment: Environment, vm: VM, checkpoint: Checkpoint, run: TaskRun) -> Backup:
    """Makes the backup that a task describes of an open checkpoint. Of one that was
    begun before, what is in the repository is not written again.

    Raises:
        UndercroftError: it did not work. It is not in the repository.
    """
    path = Path(str(run.arguments["repository"]))
    repository = await asyncio.to_thread(Repository.open, path)
    id = str(run.arguments["backup"])
    async with Held(repository, run):
        parent = await asyncio.to_thread(repository.newest, vm.meta.id)
        full = bool(run.arguments.get("full"))
        since, why = await _since(environment, vm, parent, full)
        packs = await in_thread(lambda _: repository.packs(write=True))
        packs.careful = full
        try:
            backing = Backing(
                environment, vm, checkpoint, id, str(run.arguments.get("description", ""))
            )
            async with reported(run) as report:
                await backing.put(packs, parent, since, report, path)

            def finish(_: Stop) -> None:
                with disk_full_is_clear("the backup", path):
                    packs.finish()

            await in_thread(finish)
            backup = await backing.manifest(parent, full, why, packs.written)

            def write(_: Stop) -> None:
                with disk_full_is_clear("the backup", path):
                    repository.write(backup)

            await in_thread(write)
            return backup
        except DataCorruptError as error:
            raise DataCorruptError(
                f"an earlier backup of {vm.label} is damaged: {error.message}",
                object=vm.label,
                action="see what is wrong: croft backup verify; or use another directory",
            ) from error
        except OSError as error:
            raise DataError(
                f"the repository {path} cannot be written: {error.strerror or error}",
                object=str(path),
            ) from error
        finally:
            await asyncio.shield(asyncio.to_thread(packs.close))


def finished(run: TaskRun) -> Backup | None:
    """The backup that a task describes, if a daemon made it that died after that. Blocks."""
    try:
        path = Path(str(run.arguments["repository"]))
        return Repository.open(path).get(str(run.arguments["backup"]))
    except UndercroftError:
        return None


async def _since(
    environment: Environment, vm: VM, parent: Backup | None, full: bool
) -> tuple[Checkpoint | None, str]:
    """The checkpoint to count from, and why there is none."""
    if full:
        return None, "a full one was asked for"
    if parent is None:
        return None, "it is the first one of this VM in the repository"
    for checkpoint in await checkpoints_of(environment, vm.meta.id):
        if checkpoint.meta.id == parent.checkpoint:
            return checkpoint, ""
    return None, "the checkpoint of the backup before it is gone"


class Held:
    """Holds a repository for writing while the block runs; others wait."""

    def __init__(self, repository: Repository, run: TaskRun) -> None:
        self._repository = repository
        self._run = run
        self._lock = repository.lock()

    async def __aenter__(self) -> None:
        if await asyncio.to_thread(self._lock.try_lock):
            return
        await self._run.progress(None, "waiting for the repository")
        while True:
            await asyncio.sleep(0.2)
            if await asyncio.to_thread(self._lock.try_lock):
                return

    async def __aexit__(self, *_: object) -> None:
        self._lock.close()


def result(backup: Backup) -> dict[str, Any]:
    """What a task says of a backup."""
    return {
        "backup": backup.id,
        "kind": backup.kind.value,
        "why": backup.why,
        "size": backup.size,
        "read": backup.read,
        "changed": backup.changed,
        "written": backup.written,
        "parent": backup.parent,
        "quiesced": backup.quiesced,
    }
