"""Repositories of backups on this host, as the operations see them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.host.uploads import upload_path
from undercroft.model.backup import Backup, BackupList
from undercroft.model.errors import NotFoundError
from undercroft.model.names import new_id
from undercroft.storage.backup.archive import read_manifest
from undercroft.storage.backup.repository import Repository


class Repositories:
    """The part of `undercroft.operations.services.HostServices` that concerns them."""

    async def repository(self, path: str) -> str:
        """The id of the repository in a directory, made if it is not there."""
        made = await asyncio.to_thread(Repository.create, Path(path), new_id("repository"))
        return made.id

    async def backups(self, repository: str) -> BackupList:
        """What is in a repository."""
        found, damaged = await asyncio.to_thread(lambda: _opened(repository).list())
        return BackupList(repository=repository, backups=tuple(found), damaged=tuple(damaged))

    async def backup(self, repository: str, ref: str) -> Backup:
        """One backup."""
        return await asyncio.to_thread(lambda: _opened(repository).get(ref))


async def archived(environment: Environment, upload: str) -> Backup:
    """What is in an archive that was sent.

    Raises:
        NotFoundError: there is no such upload. DataCorruptError: it is none, or cut off.
    """
    try:
        return await asyncio.to_thread(read_manifest, upload_path(environment, upload))
    except FileNotFoundError:
        raise NotFoundError(f"there is no upload {upload[:12]}", action="send it again") from None


def _opened(repository: str) -> Repository:
    return Repository.open(Path(repository))
