"""The data directory: its layout, who owns it, and which one daemon works on it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Self

from undercroft.model.errors import (
    DataCorruptError,
    DataError,
    DataLockedError,
    DataNewerError,
    InvalidError,
)
from undercroft.model.names import is_id
from undercroft.store.location import api_socket, data_location
from undercroft.store.os_errors import from_os

LAYOUT = 1
_VERSION_LIMIT = 4096  # bytes: more is not ours
_HALF = "VERSION.half"
# What may lie in a directory before it is ours: a fresh file system's own directory, what was cut
# off while making it ours, and what a daemon opens first.
_HARMLESS = {"lost+found", _HALF, "daemon.log", "daemon.lock"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

# 0711: an unprivileged QEMU or swtpm can reach what it is given the full path of (and what its
# own mode allows), but cannot look around.
_SUBDIRECTORIES = {
    "run": 0o711,
    "run/vms": 0o711,
    "images": 0o711,
    "volumes": 0o711,
    "keys": 0o700,
    "templates": 0o700,
    "exports": 0o700,
    "vms": 0o711,
    "cache": 0o700,
    "tmp": 0o711,
}


class DataDirectory:
    """Paths in a data directory. Constructing one touches nothing; see `open` and `lock`."""

    def __init__(self, path: str | Path | None = None) -> None:
        """``path``: as given by the user; None: `data_location` decides."""
        self.path = Path(data_location(None if path is None else str(path)))
        self._lock: int | None = None

    @classmethod
    def open(cls, path: str | Path | None = None) -> Self:
        """The directory, made ready: created if need be, with everything that belongs in it.

        Raises:
            DataNewerError: it has the layout of a newer version; nothing is touched.
            DataCorruptError: its VERSION is not one.
            DataError: it is not ours, not safe, or cannot be made.
            NoSpaceError: no room.
        """
        directory = cls(path)
        directory._create()
        directory.check()
        directory._complete()
        return directory

    # Paths

    @property
    def version_file(self) -> Path:
        """JSON: ``{"layout": 1}``."""
        return self.path / "VERSION"

    @property
    def lock_file(self) -> Path:
        """Locked by the daemon, whose pid it holds."""
        return self.path / "daemon.lock"

    @property
    def log_file(self) -> Path:
        """The daemon's log."""
        return self.path / "daemon.log"

    @property
    def store_file(self) -> Path:
        """The SQLite store."""
        return self.path / "store.db"

    @property
    def socket(self) -> Path:
        """The API's unix socket. Its path may be too long to bind or connect to directly."""
        return Path(api_socket(str(self.path)))

    @property
    def run(self) -> Path:
        """What is worth nothing without the processes it belongs to."""
        return self.path / "run"

    @property
    def images(self) -> Path:
        """Immutable image content, by digest."""
        return self.path / "images"

    @property
    def volumes(self) -> Path:
        """The layers of the disks of VMs."""
        return self.path / "volumes"

    @property
    def keys(self) -> Path:
        """The keys of encrypted layers. May well be, or lead to, another disk than the layers'."""
        return self.path / "keys"

    @property
    def templates(self) -> Path:
        """What belongs to templates."""
        return self.path / "templates"

    @property
    def exports(self) -> Path:
        """What was exported and waits to be fetched."""
        return self.path / "exports"

    @property
    def uploads(self) -> Path:
        """What is being sent; survives a restart, so that it can go on."""
        return self.path / "cache" / "uploads"

    @property
    def vms(self) -> Path:
        """What VMs keep besides their disks."""
        return self.path / "vms"

    @property
    def cache(self) -> Path:
        """What can be had again."""
        return self.path / "cache"

    @property
    def tmp(self) -> Path:
        """Everything half-made; swept when the daemon starts."""
        return self.path / "tmp"

    def vm_run(self, vm: str) -> Path:
        """Sockets of a VM (by id)."""
        return self.run / "vms" / _id(vm)

    def vm(self, vm: str) -> Path:
        """What a VM (by id) keeps: logs, NVRAM, TPM, suspended state."""
        return self.vms / _id(vm)

    def template(self, template: str) -> Path:
        """What belongs to a template besides the layers of its disks."""
        return self.path / "templates" / _id(template)

    def export(self, export: str) -> Path:
        """The files of an export (by id)."""
        return self.exports / _id(export)

    def layer(self, layer: str) -> Path:
        """The file of a layer of a volume (by id)."""
        return self.volumes / f"{_id(layer)}.qcow2"

    def image(self, digest: str) -> Path:
        """The directory of an image (by its hex SHA-256)."""
        if _DIGEST.fullmatch(digest) is None:
            raise InvalidError(f"{digest[:80]!r} is not a SHA-256 digest")
        return self.images / digest

    def cached(self, name: str) -> Path:
        """A file in the cache."""
        return self.cache / _file_name(name)

    def new_tmp(self, name: str = "half") -> Path:
        """A path in `tmp` that nothing else has; ``name`` is for whoever looks in there."""
        return self.tmp / f"{_file_name(name)}-{secrets.token_hex(8)}"

    # State

    def check(self) -> None:
        """Checks that it is there, ours, safe, and of a layout that this version knows.

        Raises: as `open`.
        """
        self._check_owner()
        try:
            with self.version_file.open("rb") as file:
                text = file.read(_VERSION_LIMIT)
        except FileNotFoundError:
            raise self._not_ours() from None
        except OSError as error:
            raise from_os(error, self.version_file) from error
        try:
            layout = json.loads(text)["layout"]
            if type(layout) is not int or layout < 1:
                raise ValueError(layout)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataCorruptError(
                f"{self.version_file} is damaged: it does not tell the layout",
                object=str(self.path),
                action=f'if {self.path} is a data directory of Undercroft, write {{"layout": '
                f"{LAYOUT}}} into that file; else choose another with --data or CROFT_DATA",
            ) from None
        if layout > LAYOUT:
            raise DataNewerError(
                f"{self.path} has layout {layout}; this Undercroft knows only up to {LAYOUT}",
                object=str(self.path),
                action="install the newer Undercroft that wrote it, or choose another data "
                "directory with --data or CROFT_DATA",
                found=layout,
                known=LAYOUT,
            )

    def lock(self) -> None:
        """Makes this process the directory's one daemon, until it ends or calls `unlock`.

        The kernel drops the lock with the process, however that ends. The descriptor does not pass
        to programs started from here, so a QEMU that outlives the daemon does not hold it.

        Raises:
            DataLockedError: another one is; ``data`` has its ``pid`` (None: it has just begun).
        """
        if self._lock is not None:
            return
        try:
            fd = os.open(
                self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            raise from_os(error, self.lock_file) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _pid(os.pread(fd, 32, 0))
            os.close(fd)
            raise DataLockedError(
                f"another daemon{f' (pid {holder})' if holder else ''} works on {self.path}",
                object=str(self.path),
                action="use that one, or stop it first; for a second installation choose another "
                "data directory with --data or CROFT_DATA",
                pid=holder,
            ) from None
        except OSError as error:
            os.close(fd)
            raise from_os(error, self.lock_file) from error
        with contextlib.suppress(OSError):  # only for people; a full disk must not matter
            os.pwrite(fd, f"{os.getpid()}\n".ljust(24).encode(), 0)
        self._lock = fd

    def unlock(self) -> None:
        """Lets another daemon in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def locked(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock is not None

    def sweep(self) -> int:
        """Empties `tmp`; returns how many entries were removed. For the daemon, at its start.

        Raises:
            DataError: without the lock: somebody may be working in there.
        """
        if self._lock is None:
            raise DataError(f"{self.path} is swept only by its daemon", object=str(self.path))
        removed = 0
        try:
            for entry in list(os.scandir(self.tmp)):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
                removed += 1
        except OSError as error:
            raise from_os(error, self.tmp) from error
        return removed

    def _create(self) -> None:
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.path.mkdir(mode)
            except FileExistsError:
                pass
            else:
                self.path.chmod(mode)  # whatever the umask
                _sync(self.path.parent)
            self._check_owner()
            if not self.version_file.exists():
                if set(os.listdir(self.path)) - _HARMLESS:
                    raise self._not_ours()
                self._write_version()
        except OSError as error:
            raise from_os(error, self.path) from error

    def _write_version(self) -> None:
        half = self.path / _HALF
        with half.open("w") as file:
            file.write(json.dumps({"layout": LAYOUT}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        half.rename(self.version_file)
        _sync(self.path)

    def _complete(self) -> None:
        try:
            for name, mode in _SUBDIRECTORIES.items():
                path = self.path / name
                if not path.is_dir():
                    path.mkdir()
                    path.chmod(mode)
            _sync(self.path)
        except OSError as error:
            raise from_os(error, self.path) from error

    def _check_owner(self) -> None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise DataError(
                f"there is no data directory {self.path}",
                object=str(self.path),
                action="start a daemon, which creates it, or name another with --data or "
                "CROFT_DATA",
            ) from None
        except OSError as error:
            raise from_os(error, self.path) from error
        if not self.path.is_dir():
            raise DataError(
                f"{self.path} is not a directory",
                object=str(self.path),
                action="choose another with --data or CROFT_DATA",
            )
        if stat.st_uid != os.geteuid():
            raise DataError(
                f"{self.path} belongs to uid {stat.st_uid}, and this is uid {os.geteuid()}",
                object=str(self.path),
                action="run as its owner, or choose another with --data or CROFT_DATA",
            )
        if stat.st_mode & 0o002:
            raise DataError(
                f"anybody may write into {self.path}",
                object=str(self.path),
                action=f"chmod o-w {self.path} (after a look at what is in it)",
            )

    def _not_ours(self) -> DataError:
        return DataError(
            f"{self.path} is not a data directory of Undercroft, and not empty",
            object=str(self.path),
            action="choose another with --data or CROFT_DATA",
        )


def _id(text: str) -> str:
    if not is_id(text):
        raise InvalidError(f"{text[:80]!r} is not an identifier")
    return text


def _file_name(text: str) -> str:
    if _FILE_NAME.fullmatch(text) is None:
        raise InvalidError(f"{text[:80]!r} is not usable as a file name")
    return text


def _pid(content: bytes) -> int | None:
    text = content.strip()
    return int(text) if text.isdigit() else None


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
