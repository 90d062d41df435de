"""Which backups stay, and freeing what none needs any more."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from undercroft.model.backup import Backup
from undercroft.storage.backup.maps import walk
from undercroft.storage.backup.packs import Packs
from undercroft.storage.backup.records import ZERO_HASH
from undercroft.storage.backup.repository import Repository
from undercroft.storage.threads import Stop

_WORTH = 0.5  # a pack of which so much is not needed is written anew


def kept(
    backups: Sequence[Backup], *, last: int = 0, daily: int = 0, weekly: int = 0, monthly: int = 0
) -> set[str]:
    """The ids of the backups of one VM that stay: the newest ``last``, and the newest one of each
    of so many days, weeks (ISO 8601) and months that have one. Times are UTC."""
    found: set[str] = set()
    newest = sorted(backups, key=lambda b: (b.created, b.id), reverse=True)
    found.update(b.id for b in newest[:last])
    for count, form in ((daily, "%Y-%m-%d"), (weekly, "%G-%V"), (monthly, "%Y-%m")):
        periods: set[str] = set()
        for backup in newest:
            period = time.strftime(form, time.gmtime(backup.created))
            if period not in periods and len(periods) < count:
                periods.add(period)
                found.add(backup.id)
    return found


def sweep(repository: Repository, packs: Packs, stop: Stop) -> int:
    """Frees what no backup needs; the bytes that were freed. A backup whose manifest or maps are
    damaged keeps everything: what it needs is not known.

    Raises:
        OSError: the disk is full, or the like. Nothing that is needed is lost.
    """
    backups, unreadable = repository.list()
    if unreadable:
        return 0
    needed = _needed(packs, backups, stop)
    if needed is None:
        return 0
    freed = 0
    for name in packs.names():
        stop.check()
        chunks = packs.chunks(name)
        total = sum(size for _, size in chunks)
        useful = [(digest, size) for digest, size in chunks if digest in needed]
        lost = total - sum(size for _, size in useful)
        if useful and lost < total * _WORTH:
            continue
        moved = packs.move(name, [digest for digest, _ in useful], stop)
        freed += total - moved
    return freed


def _needed(packs: Packs, backups: Iterable[Backup], stop: Stop) -> set[bytes] | None:
    needed: set[bytes] = set()
    for backup in backups:
        for disk in backup.disks:
            for segment, digests in walk(packs.get, disk):
                stop.check()
                if not isinstance(digests, list):
                    return None
                needed.add(bytes.fromhex(disk.maps[segment] or ""))
                needed.update(digest for digest in digests if digest != ZERO_HASH)
        for file in backup.files:
            needed.update(bytes.fromhex(text) for text in file.chunks)
    return needed
