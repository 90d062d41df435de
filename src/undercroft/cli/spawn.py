"""Starting the daemon of a data directory when none answers, exactly once however many ask."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time

import msgspec

from undercroft.model.errors import (
    DaemonError,
    ForbiddenError,
    NoSpaceError,
    Problem,
    UndercroftError,
    error_from_problem,
)
from undercroft.store.datadir import DataDirectory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.context import Croft
    from undercroft.client.connection import Connection
    from undercroft.client.transport import Transport

START_LIMIT = 30.0  # seconds until a daemon must answer
_STEP = 0.02
_LOG_LIMIT = 8 << 20  # bytes of log that a new daemon adds to
# For croft, not for the daemon: above all no token for another one.
_OURS = {"CROFT_URL", "CROFT_TOKEN", "CROFT_FINGERPRINT", "CROFT_CA", "CROFT_DATA"}
_TAIL = 12  # lines of the log that are shown


def ensure_daemon(croft: Croft, transport: Transport) -> Connection:
    """A connection to the daemon of this data directory, which is started unless one is there.

    Of several that call this at once one starts it, the others wait.

    Raises:
        DaemonError: it did not start, or does not answer.
        DataError: that is no data directory, or one of a newer version.
        ForbiddenError: the data directory belongs to somebody else.
        UndercroftError: whatever the daemon itself refused to start with.
    """
    deadline = time.monotonic() + START_LIMIT
    lock = _open_directory(croft.data)
    try:
        _take(lock, croft.data, deadline)
        if connection := _connect(transport):
            return connection
        log = os.path.join(croft.data, "daemon.log")
        if _held(os.path.join(croft.data, "daemon.lock")):
            return _wait(transport, None, log, 0, deadline)
        DataDirectory.open(croft.data)  # says at once if that is no place for a daemon
        _rotate(log)
        offset = os.path.getsize(log) if os.path.exists(log) else 0
        process = _spawn(croft, log)
        connection = _wait(transport, process, log, offset, deadline)
        croft.note(f"started the Undercroft daemon for {croft.data} (pid {process.pid})")
        return connection
    finally:
        os.close(lock)


def _open_directory(data: str) -> int:
    """The data directory, made if need be: it is what those who start its daemon lock."""
    try:
        if not os.path.isdir(data):
            os.makedirs(os.path.dirname(data), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                mode = 0o711 if os.geteuid() == 0 else 0o700  # as the daemon itself would
                os.mkdir(data, mode)
                os.chmod(data, mode)
        return os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        raise ForbiddenError(
            f"no daemon answers for {data}, and you may not start one there",
            action="become root, or use a directory of your own (--data DIR, CROFT_DATA)",
        ) from None
    except OSError as error:
        kind = NoSpaceError if error.errno == 28 else DaemonError  # ENOSPC
        raise kind(
            f"{data} cannot be used as a data directory ({(error.strerror or '').lower()})",
            action="choose another with --data DIR or CROFT_DATA",
        ) from None


def _take(lock: int, data: str, deadline: float) -> None:
    """Waits for the right to start the daemon."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DaemonError(
                    f"another croft has been starting the daemon for {data} for too long",
                    action=f"see {os.path.join(data, 'daemon.log')}",
                ) from None
            time.sleep(_STEP)
        else:
            return


def _connect(transport: Transport) -> Connection | None:
    try:
        return transport.connect()
    except DaemonError:
        return None


def _held(path: str) -> bool:
    """Whether somebody holds the lock of a running daemon."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _rotate(log: str) -> None:
    """Puts a log aside that has grown large; one older one is kept."""
    with contextlib.suppress(OSError):
        if os.path.getsize(log) > _LOG_LIMIT:
            os.replace(log, f"{log}.1")


def _spawn(croft: Croft, log: str) -> subprocess.Popen[bytes]:
    """The daemon, in a session of its own, with nothing of ours but the environment."""
    environ = {k: v for k, v in croft.environ.items() if k not in _OURS}
    try:
        with open(log, "ab", opener=lambda p, flags: os.open(p, flags, 0o640)) as output:
            return subprocess.Popen(
                daemon_command(croft.data),
                cwd="/",
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=0o022,
            )
    except OSError as error:
        raise DaemonError(
            f"the daemon could not be started: {error.strerror}", action=f"see {log}"
        ) from None


def daemon_command(data: str) -> list[str]:
    """What runs the daemon of a data directory, out of this very installation. What it does not
    start for it writes as problem JSON, which `_why` reads."""
    python = [sys.executable, *(["-I"] if sys.flags.isolated else [])]
    return [*python, "-m", "undercroft.cli", "--json", "daemon", "--data", data]


def _wait(
    transport: Transport,
    process: subprocess.Popen[bytes] | None,
    log: str,
    offset: int,
    deadline: float,
) -> Connection:
    lock = os.path.join(os.path.dirname(log), "daemon.lock")
    while True:
        if connection := _connect(transport):
            return connection
        ended = process is not None and process.poll() is not None
        # It may have ended because somebody else's daemon was quicker: then that one will answer.
        if ended and not _held(lock):
            raise _why(log, offset)
        if time.monotonic() > deadline:
            who = f" (pid {process.pid})" if process is not None else ""
            raise DaemonError(
                f"the daemon{who} runs, but has not answered for {START_LIMIT:.0f} seconds",
                action=_last_words(log, offset),
            )
        time.sleep(_STEP)


def _why(log: str, offset: int) -> UndercroftError:
    """What the daemon did not start for: its own error, or the end of its log."""
    for line in reversed(_read(log, offset)):
        with contextlib.suppress(msgspec.DecodeError):
            return error_from_problem(msgspec.json.decode(line, type=Problem))
    return DaemonError("the daemon did not start", action=_last_words(log, offset))


def _last_words(log: str, offset: int) -> str:
    lines = _read(log, offset)
    if not lines:
        return f"it said nothing in {log}; start it by hand to see more: croft daemon"
    return "\n".join([f"the end of {log}:", *(f"  {line[:300]}" for line in lines[-_TAIL:])])


def _read(log: str, offset: int) -> list[str]:
    try:
        with open(log, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(offset, size - 65536))
            return [line for line in file.read().decode("utf-8", "replace").splitlines() if line]
    except OSError:
        return []
