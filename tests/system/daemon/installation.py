"""A whole installation for tests: a data directory, its daemon as a process, a client."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from tests.system.built_images import content_of
from undercroft.client.client import Client
from undercroft.client.connect import Endpoint
from undercroft.host import orphans
from undercroft.host.registration import register
from undercroft.model.base import Meta
from undercroft.model.errors import DaemonError, UndercroftError
from undercroft.model.image import Image, ImageSourceKind, ImageSpec, ImageState, ImageStatus
from undercroft.model.names import new_id
from undercroft.model.requests import ExecRequest, VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import VM, Port, PortMode
from undercroft.operations.context import scope
from undercroft.storage.images import ImageStore
from undercroft.store.datadir import DataDirectory
from undercroft.store.interface import Claim, Put, Transaction
from undercroft.store.sqlite import SQLiteStore

T = TypeVar("T")
PATIENCE = 90.0  # seconds that anything may take on a busy machine


class Installation:
    """One data directory. The daemon is a real process, killed and started as the test likes."""

    def __init__(self, data: Path, environ: dict[str, str] | None = None) -> None:
        self.data = data
        # What tests do not ask for, they must not get: boots in the background.
        self.environ = {"CROFT_WARM": "off", **(environ or {})}
        self.daemon: subprocess.Popen[bytes] | None = None

    # -- the daemon -------------------------------------------------------------------------

    def start(self, *, wait: bool = True) -> None:
        """Starts the daemon; waits until it answers."""
        self.data.parent.mkdir(parents=True, exist_ok=True)
        self.daemon = subprocess.Popen(
            [sys.executable, "-m", "undercroft.cli", "daemon", "--data", str(self.data)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.log.open("ab"),
            start_new_session=True,
            env={**os.environ, **self.environ},
        )
        if wait:
            until(self.answers, "the daemon answers")

    def answers(self) -> bool:
        """Whether the daemon answers; fails if it has ended."""
        assert self.daemon is not None
        assert self.daemon.poll() is None, self.log.read_text()
        try:
            self.client.version()
        except DaemonError:
            return False
        return True

    def kill(self) -> None:
        """kill -9."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def stop(self) -> None:
        """Ends the daemon as init would."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait(PATIENCE)

    def close(self) -> None:
        """Ends everything that belongs to the data directory, whatever state it is in."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.kill()
        orphans.end_processes(self.data, set(self.processes()))

    @property
    def log(self) -> Path:
        """What the daemon said."""
        return self.data.with_name(f"{self.data.name}.log")

    @property
    def client(self) -> Client:
        """A new client."""
        return Client(Endpoint(path=str(self.data / "run" / "api.sock")))

    def processes(self) -> dict[int, str]:
        """Living emulators of this installation: pid → id of the VM."""
        return orphans.marked_processes(self.data)

    # -- things in it -----------------------------------------------------------------------

    def add_image(self, source: Path, name: str = "tiny") -> None:
        """Puts a built image in, while no daemon runs."""
        asyncio.run(self._add_image(source, name))

    async def _add_image(self, source: Path, name: str) -> None:
        directory = DataDirectory.open(self.data)
        images = ImageStore(directory.images, directory.tmp)
        half = images.new_directory()
        shutil.copytree(source, half, dirs_exist_ok=True)
        digest, content = await images.add(half, content_of(source))
        store = await SQLiteStore.open(directory.store_file)
        now = time.time()
        await register(store, now)
        image = Image(
            meta=Meta(id=new_id("image"), name=name, created=now),
            spec=ImageSpec(source=ImageSourceKind.BUILD, value=name),
            status=ImageStatus(state=ImageState.READY, digest=digest, content=content),
        )
        claim = Claim(scope("image"), name, image.meta.id)
        await store.transact(Transaction(claims=[claim], puts=[Put(image)]))
        await store.close()

    def run(self, name: str, *, ready: bool = True, **values: object) -> VM:
        """Creates and starts a tiny VM, and waits until its userspace is up."""
        request = VMCreate(
            name=name, image="tiny", start=True, ports=(Port(mode=PortMode.RESTRICTED),)
        )
        task = self.client.vms.create(msgspec.structs.replace(request, **values))
        self.finish(task)
        if ready:
            self.wait_ready(name)
        return self.client.vms.get(name)

    def wait_ready(self, name: str) -> None:
        """Waits until the guest agent of a VM answers."""

        def answers() -> bool:
            try:
                request = ExecRequest(argv=("true",), timeout=10.0)
                return self.client.vms.exec(name, request).exit_code == 0
            except UndercroftError:
                return False

        until(answers, f"{name} answers")

    def shell(self, name: str, command: str) -> str:
        """What a command prints in a guest."""
        request = ExecRequest(argv=("/bin/sh", "-c", command), timeout=60.0)
        return self.client.vms.exec(name, request).stdout.decode().strip()

    def in_background(self, name: str, command: str) -> None:
        """Starts a command in a guest that goes on after the agent has answered."""
        self.shell(name, f"({command}) </dev/null >/dev/null 2>&1 &")

    def finish(self, task: Task, state: TaskState = TaskState.SUCCEEDED) -> Task:
        """Waits for a task's end, which must be this one."""

        def final() -> Task | None:
            try:
                found = self.client.tasks.get(task.meta.id)
            except DaemonError:
                return None
            return found if found.status.state.final else None

        found = until(final, f"{task.spec.verb} is done")
        assert found.status.state is state, found.status
        return found

    def wait_state(self, name: str, state: str) -> VM:
        """Waits until a VM is in a state and nothing is under way."""

        def there() -> VM | None:
            vm = self.client.vms.get(name)
            return vm if vm.status.state == state and not vm.tasks else None

        return until(there, f"{name} is {state}")

    def assert_in_order(self) -> None:
        """Nothing is left over: no orphan process, file or record, and none is missing."""
        report = self.client.hosts.check()
        assert report.findings == (), report.findings


def until(condition: Callable[[], T | None], what: str, patience: float = PATIENCE) -> T:
    """Waits until the condition is true, and returns what it gave."""
    deadline = time.monotonic() + patience
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {patience:g} s in vain until {what}"
        time.sleep(0.05)


def wait_gone(pid: int) -> None:
    """Waits until a process is no more (a zombie is no more)."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], PATIENCE)[0], f"process {pid} does not end"
    finally:
        os.close(handle)
