"""The thread that writes. It commits what has gathered while it was busy, all at once.

An fsync costs milliseconds, and one can make any number of transactions durable (group commit:
DeWitt et al., "Implementation Techniques for Main Memory Database Systems", SIGMOD 1984). Each
transaction has a savepoint and a revision of its own: one that fails takes nothing with it.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from undercroft.model.errors import NoSpaceError, UnavailableError, UndercroftError
from undercroft.store.interface import Change, Changes
from undercroft.store.sqlite.failures import from_sqlite, unsure_on_disk
from undercroft.store.sqlite.reserve import Reserve
from undercroft.store.sqlite.statements import Work, compact

MOST_AT_ONCE = 256  # bounds how long the first of a crowd waits
SPARE_PAGES = 1024  # free pages not given back to the file system: the next records need them
STEP_PAGES = 256  # given back at a time, so that transactions do not wait


@dataclass(slots=True)
class Job:
    """Work, and who waits for its revision."""

    work: Work
    done: asyncio.Future[int] | None = None


@dataclass(slots=True)
class Outcome:
    """What became of a job: an error, or changes as of a revision."""

    job: Job
    revision: int = 0
    changes: list[Change] | None = None
    error: UndercroftError | None = None

    def resolve(self) -> None:
        """Tells whoever waits."""
        done = self.job.done
        if done is None or done.done():
            return
        if self.error is not None:
            done.set_exception(self.error)
        else:
            done.set_result(self.revision)


@dataclass(slots=True)
class Batch:
    """What one commit did. History up to and including ``compacted`` is forgotten."""

    outcomes: list[Outcome] = field(default_factory=list)
    compacted: int = 0

    def changes(self) -> list[Changes]:
        """The transactions that took effect, in order."""
        return [Changes(o.revision, o.changes) for o in self.outcomes if o.changes is not None]


@dataclass(frozen=True, slots=True)
class Retention:
    """How much history is kept: so many revisions, and so many bytes of records."""

    revisions: int = 20_000
    size: int = 64 << 20


def _last(db: sqlite3.Connection, revision: int) -> None:
    """The work after which there is none; never carried out."""


class Writer:
    """Owns the connection that writes. ``deliver`` is called on the event loop, batch by batch."""

    def __init__(
        self,
        db: sqlite3.Connection,
        path: Path,
        retention: Retention,
        deliver: Callable[[Batch], None],
    ) -> None:
        self._db = db
        self._path = path
        self._retention = retention
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._broken: UndercroftError | None = None
        self._excess = False  # more history than is to be kept
        self._freed = False  # there may be pages to give back
        self._reserve = Reserve(path)
        self._spent = False  # what was kept for a full disk
        # A daemon thread: a program that forgets to close the store can end all the same.
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> asyncio.Future[int]:
        """Queues work; the future gets its revision."""
        done: asyncio.Future[int] = self._loop.create_future()
        self._queue.put(Job(work, done))
        return done

    async def stop(self) -> None:
        """Finishes what is queued."""
        done: asyncio.Future[int] = self._loop.create_future()
        self._queue.put(Job(_last, done))
        await done

    def _run(self) -> None:
        while True:
            jobs = self._gather()
            work = [job for job in jobs if job.work is not _last]
            if work:
                self._hand_over(self._carry_out(work))
            if len(work) < len(jobs):
                self._hand_over(Batch([Outcome(jobs[-1])]))
                return
            if self._excess:
                self._excess = False
                self._freed = True
                limits = compact(self._retention.revisions, self._retention.size)
                self._hand_over(self._carry_out([Job(limits)]))
            if self._freed and self._queue.empty():
                self._give_back()

    def _gather(self) -> list[Job]:
        jobs = [self._queue.get()]
        while len(jobs) < MOST_AT_ONCE and jobs[-1].work is not _last:
            try:
                jobs.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return jobs

    def _hand_over(self, batch: Batch) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, batch)
        except RuntimeError:
            return  # the loop was closed without closing the store: nobody waits any more

    def _carry_out(self, jobs: list[Job]) -> Batch:
        if self._broken is not None:
            return Batch([Outcome(job, error=self._broken) for job in jobs])
        try:
            return self._commit(jobs)
        except sqlite3.Error as error:
            failure = self._undo(error)
            if isinstance(failure, NoSpaceError) and self._begin_anew():
                return self._carry_out(jobs)
            if len(jobs) > 1 and self._broken is None:
                # The disk may be too full for all of them, but not for each.
                singles = [self._carry_out([job]) for job in jobs]
                return Batch(
                    [outcome for single in singles for outcome in single.outcomes],
                    max(single.compacted for single in singles),
                )
            return Batch([Outcome(job, error=failure) for job in jobs])

    def _begin_anew(self) -> bool:
        """On a full disk: has the log begin anew, whose space is taken, with what was kept for the
        database to grow by; whether there was something."""
        if self._broken is not None or not self._reserve.make_way():
            return False
        self._spent = True
        try:
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            self._undo(error)
        return self._broken is None

    def _commit(self, jobs: list[Job]) -> Batch:
        """One commit for all jobs.

        Raises:
            sqlite3.Error: nothing took effect.
        """
        db = self._db
        batch = Batch()
        db.execute("BEGIN IMMEDIATE")
        before, compacted = db.execute("SELECT revision, compacted FROM state").fetchone()
        revision = before
        for job in jobs:
            outcome = self._one(job, revision)
            revision = max(revision, outcome.revision)
            batch.outcomes.append(outcome)
        if all(outcome.error is not None for outcome in batch.outcomes):
            db.execute("ROLLBACK")
            batch.compacted = compacted
            return batch
        ((batch.compacted, logged),) = db.execute(
            "UPDATE state SET revision = ?, logged = logged + "
            "(SELECT coalesce(sum(size), 0) FROM change WHERE revision > ?) "
            "RETURNING compacted, logged",
            (revision, before),
        ).fetchall()
        db.execute("COMMIT")
        if self._spent:
            self._spent = not self._reserve.take_growth()
        keep, size = self._retention.revisions, self._retention.size
        # Somewhat late, so that it is worth it.
        self._excess = revision - batch.compacted > keep + keep // 10 or logged > size + size // 10
        self._freed = self._freed or batch.compacted > compacted
        return batch

    def _one(self, job: Job, revision: int) -> Outcome:
        db = self._db
        db.execute("SAVEPOINT one")
        try:
            changes = job.work(db, revision + 1)
        except UndercroftError as error:
            db.execute("ROLLBACK TO one")
            db.execute("RELEASE one")
            return Outcome(job, error=error)
        except sqlite3.Error:
            raise
        except Exception as error:  # a fault of ours must not end the thread
            db.execute("ROLLBACK TO one")
            db.execute("RELEASE one")
            return Outcome(job, error=UndercroftError(f"the store failed: {error!r}"))
        db.execute("RELEASE one")
        if changes is None:
            return Outcome(job, revision)
        return Outcome(job, revision + 1, changes)

    def _undo(self, error: sqlite3.Error) -> UndercroftError:
        failure = from_sqlite(error, self._path)
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error as second:
            failure = self._broken = from_sqlite(second, self._path)
        if unsure_on_disk(error):
            self._broken = UnavailableError(
                f"the disk failed to write {self._path}",
                object=str(self._path),
                action="check the disk, then restart the daemon",
            )
            failure = self._broken
        return failure

    def _give_back(self) -> None:
        """In a quiet moment: returns free pages to the file system."""
        try:
            (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
            while free > SPARE_PAGES + STEP_PAGES:
                if not self._queue.empty():
                    return  # goes on later
                # Not execute: it would stop after the first page.
                self._db.executescript(f"PRAGMA incremental_vacuum({STEP_PAGES});")
                free -= STEP_PAGES
            self._freed = False
        except sqlite3.Error as error:
            self._undo(error)  # the next transaction tells if it matters
