"""Repositories of backups on this host, as the operations see them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from undercroft.model.backup import Backup, BackupList
from undercroft.model.names import new_id
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


def _opened(repository: str) -> Repository:
    return Repository.open(Path(repository))
