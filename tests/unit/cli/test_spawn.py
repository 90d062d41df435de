"""Starting the daemon: once, however many ask, and with its reason if it does not start."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from undercroft.cli import spawn
from undercroft.cli.context import Croft
from undercroft.model.errors import DaemonError, DataError, DataNewerError, ForbiddenError

# Stands in for the daemon: holds the lock, listens, and answers nobody.
DAEMON = """
import fcntl, os, socket, sys, time
data, delay = sys.argv[1], float(sys.argv[2])
with open(f"{data}/starts", "a") as file:
    file.write("x")
lock = open(f"{data}/daemon.lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("another daemon works here", flush=True)
    sys.exit(1)
time.sleep(delay)
os.makedirs(f"{data}/run", exist_ok=True)
listener = socket.socket(socket.AF_UNIX)
path = f"{data}/run/api.sock"
if os.path.exists(path):
    os.unlink(path)
listener.bind(path)
listener.listen()
print(os.getcwd(), os.getsid(0) == os.getpid(), oct(os.umask(0)), "CROFT_TOKEN" in os.environ, os.environ.get("CROFT_LOG"), flush=True)
time.sleep(60)
"""  # noqa: E501


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """Has the stand-in started; ends what was started. ``use`` changes the program."""
    running: list[subprocess.Popen[bytes]] = []
    chosen = {"program": DAEMON, "delay": "0"}
    real = spawn._spawn

    def start(croft: Croft, log: str) -> subprocess.Popen[bytes]:
        running.append(real(croft, log))
        return running[-1]

    monkeypatch.setattr(spawn, "_spawn", start)
    monkeypatch.setattr(
        spawn,
        "daemon_command",
        lambda data: [sys.executable, "-c", chosen["program"], data, chosen["delay"]],
    )
    yield chosen, running
    for process in running:
        process.kill()
        process.wait()


def starts(data: Path) -> int:
    return len((data / "starts").read_text())


def test_it_is_started_apart_from_its_caller(data, started, capfd, monkeypatch):
    monkeypatch.setenv("CROFT_TOKEN", "secret")
    monkeypatch.setenv("CROFT_LOG", "debug")
    raw = Croft().connect()
    raw.close()
    _, running = started
    assert (
        f"started the Undercroft daemon for {data} (pid {running[0].pid})" in capfd.readouterr().err
    )
    assert (data / "daemon.log").read_text().split() == ["/", "True", "0o22", "False", "debug"]


def test_a_log_that_has_grown_large_is_put_aside(data, started, monkeypatch):
    monkeypatch.setattr(spawn, "_LOG_LIMIT", 10)
    (data / "daemon.log").write_text("from yesterday\n")
    Croft().connect().close()
    assert (data / "daemon.log.1").read_text() == "from yesterday\n"
    assert "yesterday" not in (data / "daemon.log").read_text()


def test_the_second_time_it_is_there(data, started):
    Croft().connect().close()
    Croft().connect().close()
    assert starts(data) == 1


def test_many_at_once_start_one(data, started):
    chosen, _ = started
    chosen["delay"] = "0.3"
    failures = []

    def connect() -> None:
        try:
            Croft(quiet=True).connect().close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=connect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert starts(data) == 1


def test_a_stale_socket_is_no_daemon(data, started):
    Croft().connect().close()
    _, running = started
    running[0].send_signal(signal.SIGKILL)
    running[0].wait()
    assert (data / "run" / "api.sock").exists()
    Croft().connect().close()
    assert starts(data) == 2


def test_one_that_is_starting_already_is_waited_for(data, started):
    _, running = started
    other = subprocess.Popen([sys.executable, "-c", DAEMON, str(data), "0.4"])
    try:
        while not (data / "daemon.lock").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        Croft().connect().close()
        assert running == []
    finally:
        other.kill()
        other.wait()


def test_its_own_reason_is_passed_on(data, started):
    chosen, _ = started
    error = DataNewerError("it has layout 9", action="get a newer one")
    problem = msgspec.json.encode(error.problem()).decode()
    chosen["program"] = f"print('noise'); print({problem!r}); print('[1, 2]')"
    with pytest.raises(DataNewerError) as caught:
        Croft().connect()
    assert caught.value.message == "it has layout 9"
    assert caught.value.action == "get a newer one"


def test_a_directory_that_is_somebody_elses_stays_as_it_is(data, started):
    (data / "thesis.tex").touch()
    with pytest.raises(DataError, match="not a data directory"):
        Croft().connect()
    _, running = started
    assert running == []
    assert [path.name for path in data.iterdir()] == ["thesis.tex"]


def test_without_a_reason_its_last_words_are_shown(data, started):
    (data / "daemon.log").write_text("from yesterday\n")
    chosen, _ = started
    chosen["program"] = "raise RuntimeError('bang')"
    with pytest.raises(DaemonError) as caught:
        Croft().connect()
    assert "RuntimeError: bang" in str(caught.value.action)
    assert str(data / "daemon.log") in str(caught.value.action)
    assert "yesterday" not in str(caught.value.action)


def test_one_that_never_answers(data, started, monkeypatch):
    chosen, _ = started
    monkeypatch.setattr(spawn, "START_LIMIT", 0.5)
    chosen["program"] = "import time; time.sleep(60)"
    with pytest.raises(DaemonError, match="has not answered"):
        Croft().connect()


def test_a_place_that_cannot_be_used(data, started):
    (data / "file").touch()
    with pytest.raises(DaemonError, match="cannot be used"):
        Croft(data=f"{data}/file").connect()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_is_not_ours(data, started):
    data.chmod(0o500)
    try:
        with pytest.raises(ForbiddenError):
            Croft(data=f"{data}/below").connect()
    finally:
        data.chmod(0o700)
