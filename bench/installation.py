"""An Undercroft of the benchmark's own: a data directory in a temporary place, and its daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.processes import clean_environment, end, run
from undercroft.client.client import Client
from undercroft.client.connect import Endpoint
from undercroft.model.base import Meta
from undercroft.model.errors import DaemonError
from undercroft.model.host import Host
from undercroft.model.names import new_id
from undercroft.model.vm import VM, Display, Exit, ExitReason, Port, VMSpec, VMState, VMStatus
from undercroft.store.interface import Claim, Put, Transaction
from undercroft.store.sqlite import SQLiteStore

_START_LIMIT = 60.0  # seconds
_BATCH = 100  # records in one transaction


class Installation:
    """A data directory and what is done with it. Its daemon is our child while it runs."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.program = str(Path(sys.executable).with_name("croft"))
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self._daemon is not None
        return self._daemon.pid

    @property
    def client(self) -> Client:
        """A new client of the daemon."""
        return Client(Endpoint(path=str(self.data / "run/api.sock")))

    def command(self, *words: str) -> list[str]:
        """The command line of croft with these words."""
        return [self.program, "--data", str(self.data), *words]

    def croft(self, *words: str) -> Any:
        """What croft says to these words, as JSON.

        Raises:
            RuntimeError: it failed.
        """
        text = run(self.command("--json", *words), timeout=600.0)
        return json.loads(text) if text.strip() else None

    def start_daemon(self, *wrapper: str, warm: str = "off") -> None:
        """Starts the daemon and waits until it answers; ``wrapper`` is put before its command.
        ``warm``: what it keeps of templates and VMs that are held ready (``CROFT_WARM``).

        Raises:
            RuntimeError: it does not run; with the end of its log.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        with (self.data / "daemon.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                [*wrapper, *self.command("daemon")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**clean_environment(), "CROFT_WARM": warm},
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_LIMIT
        while True:
            with contextlib.suppress(DaemonError), self.client as client:
                client.version()
                return
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                words = (self.data / "daemon.log").read_text(errors="replace")[-1500:]
                raise RuntimeError(f"the daemon does not run: {words}")
            time.sleep(0.05)

    def stop_daemon(self) -> None:
        """Ends the daemon; its VMs run on."""
        if self._daemon is not None:
            end(self._daemon)
            self._daemon = None

    def image(self, name: str = "tiny") -> None:
        """Has the image there: builds it unless it is."""
        images = self.croft("image", "ls")
        if not any(image["meta"]["name"] == name for image in images):
            self.croft("image", "build", name)

    def create(self, name: str, *words: str) -> None:
        """Makes a tiny VM that is not running, cut off from every network."""
        self.croft("run", "tiny", "--name", name, "--network", "restricted", "--no-start", *words)

    def know(self, count: int) -> list[str]:
        """Writes down VMs as if they had been created and run; their names. The daemon must have
        run once, and not run now."""
        return asyncio.run(self._know(count))

    async def _know(self, count: int) -> list[str]:
        store = await SQLiteStore.open(self.data / "store.db")
        try:
            host = (await store.list(Host)).items[0].record.meta.id
            vms = [_vm(number, host) for number in range(count)]
            for start in range(0, count, _BATCH):
                part = vms[start : start + _BATCH]
                claims = [Claim("vm/default", vm.meta.name, vm.meta.id) for vm in part]
                puts = [Put(vm) for vm in part]
                await store.transact(Transaction(claims=claims, puts=puts))
        finally:
            await store.close()
        return [vm.meta.name for vm in vms]


def _vm(number: int, host: str) -> VM:
    created = 1_700_000_000.0 + number
    mac = f"52:54:00:01:{number >> 8:02x}:{number & 255:02x}"
    return VM(
        meta=Meta(
            id=new_id("vm"),
            name=f"known-{number:04}",
            created=created,
            labels={"env": ("prod", "test")[number % 2]},
        ),
        spec=VMSpec(host=host, memory=512 << 20, display=Display.STD, ports=(Port(mac=mac),)),
        status=VMStatus(
            state=VMState.STOPPED,
            last_exit=Exit(reason=ExitReason.STOPPED, time=created + 60),
        ),
    )


@contextlib.contextmanager
def installation(directory: Path) -> Iterator[Installation]:
    """An installation without a daemon, on a directory that need not exist. In the end the daemon
    is stopped and the directory removed; what runs on then is ended by `processes.end_children`."""
    ours = Installation(directory)
    try:
        yield ours
    finally:
        ours.stop_daemon()
        shutil.rmtree(directory, ignore_errors=True)


def described(program: Sequence[str]) -> str:
    """The first line of what a program says of its version."""
    if shutil.which(program[0]) is None:
        return "not installed"
    return run(program).decode(errors="replace").splitlines()[0].strip()


def is_root() -> bool:
    """Whether we run as root."""
    return os.geteuid() == 0
