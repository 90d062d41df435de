"""croft as a person uses it: a real daemon that it starts itself, a real guest, a real terminal."""

import os
import pty
import select
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import undercroft
from tests.system.daemon.installation import PATIENCE, Installation

COMMAND = [sys.executable, "-m", "undercroft.cli"]


class Person:
    """Types commands into one installation."""

    def __init__(self, data: Path, home: Path) -> None:
        self.data = data
        source = str(Path(undercroft.__file__).parents[1])
        hidden = {"CROFT_URL", "CROFT_DEBUG", "FORCE_COLOR"}
        self.environ = {k: v for k, v in os.environ.items() if k not in hidden}
        self.environ |= {"CROFT_DATA": str(data), "PYTHONPATH": source, "HOME": str(home)}

    def croft(
        self, *words: str, code: int = 0, input: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a command to its end, which must have this exit code."""
        done = subprocess.run(
            [*COMMAND, *words],
            env=self.environ,
            capture_output=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL if input is None else None,
            input=input,
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done


@pytest.fixture
def person(tiny_image_dir: Path, tmp_path: Path) -> Iterator[Person]:
    """Somebody with the image tiny, and no daemon."""
    with tempfile.TemporaryDirectory(prefix="croft-") as place:
        Path(place).chmod(0o711)
        installation = Installation(Path(place) / "data")
        installation.add_image(tiny_image_dir)
        person = Person(installation.data, tmp_path)
        try:
            yield person
        finally:
            person.croft("daemon", "stop")
            installation.close()


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, person: Person, *words: str) -> None:
        self.main, self.user = pty.openpty()
        self.before = termios.tcgetattr(self.user)
        self.seen = b""
        self.process = subprocess.Popen(
            [*COMMAND, *words],
            env={**person.environ, "TERM": "xterm"},
            stdin=self.user,
            stdout=self.user,
            stderr=self.user,
            start_new_session=True,
        )

    def type(self, keys: bytes) -> None:
        """Presses keys."""
        os.write(self.main, keys)

    def wait_for(self, text: bytes) -> None:
        """Reads until the text appears."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, (text, self.seen)
            if select.select([self.main], [], [], left)[0]:
                self.seen += os.read(self.main, 65536)

    def close(self) -> int:
        """Waits for its end; the terminal must be as it was."""
        code = self.process.wait(PATIENCE)
        after = termios.tcgetattr(self.user)
        os.close(self.main)
        os.close(self.user)
        assert after == self.before
        return code


def test_a_session(person: Person, tmp_path: Path) -> None:
    made = person.croft("run", "tiny", "--name", "t1", "--network", "restricted")
    assert b"started the Undercroft daemon for" in made.stderr
    assert made.stdout.startswith(b"t1 is running (1 CPU")
    assert b"croft console t1" in made.stdout

    # Into the guest, while it is still booting.
    done = person.croft(
        "exec", "t1", "--", "sh", "-c", "hostname; cat; exit 7", code=7, input=b"in"
    )
    assert done.stdout == b"t1\nin"
    (tmp_path / "file").write_bytes(bytes(range(256)) * 100)
    person.croft("cp", str(tmp_path / "file"), "t1:/tmp")
    assert person.croft("cp", "t1:/tmp/file", "-").stdout == (tmp_path / "file").read_bytes()
    person.croft("exec", "t1", "--", "nonsense", code=127)

    # Its console, left with Ctrl-]; then with a signal.
    terminal = Terminal(person, "console", "t1")
    terminal.wait_for(b"connected to t1")
    terminal.type(b"\recho $((6 * 7))-there\r")
    terminal.wait_for(b"42-there")
    terminal.type(b"\x1d")
    terminal.wait_for(b"left t1")
    assert terminal.close() == 0
    assert b"42-there" in person.croft("log", "t1").stdout
    terminal = Terminal(person, "console", "t1", "--read-only")
    terminal.wait_for(b"42-there")  # the scrollback
    terminal.process.terminate()
    assert terminal.close() == 128 + 15

    # The daemon dies; the next command starts another, which finds the VM.
    pid = person.croft("show", "t1", "--field", "status.instance.pid").stdout
    daemon = int((person.data / "daemon.lock").read_text())
    os.kill(daemon, 9)
    listed = person.croft("ls")
    assert b"started the Undercroft daemon" in listed.stderr
    assert b"t1    running" in listed.stdout
    assert person.croft("show", "t1", "--field", "status.instance.pid").stdout == pid

    person.croft("rm", "t1", code=1)
    person.croft("stop", "--force", "t1")
    person.croft("rm", "t1")
    assert person.croft("ls", "-q").stdout == b""
    person.croft("show", "t1", code=3)
    assert b"all is in order" in person.croft("host", "check").stdout


def test_several_at_once_start_one_daemon(person: Person) -> None:
    running = [
        subprocess.Popen(
            [*COMMAND, "image", "ls"],
            env=person.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    outcomes = [process.communicate(timeout=PATIENCE) for process in running]
    assert [process.returncode for process in running] == [0] * 4, outcomes
    assert all(b"tiny  ready" in out for out, _ in outcomes)
    assert sum(b"started the Undercroft daemon" in err for _, err in outcomes) == 1
