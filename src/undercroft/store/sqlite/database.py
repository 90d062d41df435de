"""Opening the database file: create, recognise, migrate, verify."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from undercroft.model.errors import DataError, DataNewerError, NoSpaceError, UndercroftError
from undercroft.store.os_errors import from_os
from undercroft.store.sqlite.codec import Codec
from undercroft.store.sqlite.failures import corrupt, from_sqlite
from undercroft.store.sqlite.migrations import Migration
from undercroft.store.sqlite.reserve import WAL_PAGES, Reserve

APPLICATION = 0x43524F46  # "CROF", in the header of the file (PRAGMA application_id)
WRITE_WAIT = 10.0  # seconds to wait for another program that has the file locked
READ_WAIT = 0.5  # reads happen on the event loop, and are never locked out by our own writes


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise from_sqlite(error, path) from error


def open_writer(path: Path, codec: Codec, migrations: Sequence[Migration]) -> sqlite3.Connection:
    """The connection that writes; the file is created, or verified and brought up to date.

    Raises:
        DataNewerError: written by a newer version; the file is left untouched.
        DataCorruptError: damaged, or not an Undercroft store.
        DataError: the directory is missing or not writable.
        NoSpaceError: no room to create or migrate it.
    """
    unclean = _prepare_file(path)
    reserve = Reserve(path)
    reserve.make_way()
    try:
        db = _open(path, codec, migrations, unclean)
    except NoSpaceError:
        if not reserve.give_up():
            raise
        db = _open(path, codec, migrations, unclean)
    reserve.take_log()
    return db


def close_writer(db: sqlite3.Connection, path: Path) -> None:
    """Closes the connection that writes, as the last one."""
    with translated(path):
        db.close()
    Reserve(path).close()


def _open(
    path: Path, codec: Codec, migrations: Sequence[Migration], unclean: bool
) -> sqlite3.Connection:
    with translated(path):
        db = sqlite3.connect(
            path, timeout=WRITE_WAIT, isolation_level=None, check_same_thread=False
        )
        try:
            version = _recognise(db, path, len(migrations))
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # heeded only by an empty file
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise DataError(
                    f"the file system of {path.parent} cannot hold the store: it lacks shared "
                    "memory or locks",
                    object=str(path),
                    action="use a local file system for the data directory",
                )
            db.execute("PRAGMA synchronous = FULL")  # fsync before a transaction is acknowledged
            db.execute("PRAGMA trusted_schema = OFF")
            db.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
            if unclean:
                _check_pages(db, path)
            if version < len(migrations):
                _migrate(db, path, version, migrations)
            _check_records(db, codec)
        except BaseException:
            db.close()
            raise
    return db


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that can only read. It sees every transaction that was committed before."""
    with translated(path):
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=READ_WAIT,
            isolation_level=None,
            check_same_thread=False,
        )
        db.execute("PRAGMA trusted_schema = OFF")
        return db


def _prepare_file(path: Path) -> bool:
    """Creates the file, for its owner only; returns whether it was not closed properly.

    The file is never opened here except to create it: closing any descriptor of it would drop the
    POSIX locks that SQLite holds in this process (https://www.sqlite.org/howtocorrupt.html, 2.2).
    """
    try:
        try:
            # SQLite gives the -wal and -shm files the mode of the database file.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            if not path.is_file() or path.is_symlink():
                raise corrupt(path, "it is not an ordinary file") from None
            stat = path.stat()
            if 0 < stat.st_size < 512:  # SQLite would take it for an empty database
                raise corrupt(path, "it is not a database") from None
            if stat.st_mode & 0o077:
                path.chmod(0o600)
        wal = path.with_name(path.name + "-wal")
        return wal.exists() and wal.stat().st_size > 0
    except OSError as error:
        raise from_os(error, path) from error


def _recognise(db: sqlite3.Connection, path: Path, known: int) -> int:
    """The version of the file; 0 for an empty one."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION:
        if application or version or tables:
            raise corrupt(path, "it is a database of another program")
        return 0
    if version > known:
        raise DataNewerError(
            f"{path} has version {version} of the store's format; this Undercroft knows only up to "
            f"version {known}",
            object=str(path),
            action=f"install the newer Undercroft that wrote it, or put back {path.name}.bak-"
            f"{known} (the state before the upgrade)",
            found=version,
            known=known,
        )
    return version


def _check_pages(db: sqlite3.Connection, path: Path) -> None:
    """After a crash: SQLite survives those, but disks that lie about fsync do not."""
    findings = [row[0] for row in db.execute("PRAGMA quick_check(3)")]
    if findings != ["ok"]:
        raise corrupt(path, "; ".join(findings))


def _check_records(db: sqlite3.Connection, codec: Codec) -> None:
    """Finds at the start, rather than in the middle of something, what cannot be read."""
    for kind, id, text in db.execute("SELECT kind, id, value FROM record"):
        codec.decode(kind, id, text)


def _migrate(
    db: sqlite3.Connection, path: Path, version: int, migrations: Sequence[Migration]
) -> None:
    if version > 0:
        back_up(db, path, version)
    for number, migration in enumerate(migrations[version:], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            migration(db)
            if version > 0:  # what the old records looked like is nobody's business any more
                db.execute("DELETE FROM change")
                db.execute("UPDATE state SET compacted = revision, logged = 0")
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        except Exception as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error | UndercroftError):
                raise
            raise UndercroftError(
                f"{path} could not be brought to version {number}: {error}",
                object=str(path),
                action="the file is as it was; report this, and use the previous Undercroft",
            ) from error


def back_up(db: sqlite3.Connection, path: Path, version: int) -> Path:
    """Copies the database beside itself as ``<name>.bak-<version>``, durably."""
    target = path.with_name(f"{path.name}.bak-{version}")
    half = target.with_name(target.name + ".half")
    try:
        half.unlink(missing_ok=True)
        os.close(os.open(half, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            with contextlib.closing(sqlite3.connect(half)) as copy:
                db.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, complete in itself
            half.rename(target)
        except BaseException:
            half.unlink(missing_ok=True)
            raise
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise from_os(error, target) from error
    return target
