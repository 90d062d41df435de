"""What the agent and its actors work with: the store, the data directory, emulators, a clock."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from undercroft.hypervisor.emulator import Emulator, find_emulator
from undercroft.model.snapshot import Snapshot
from undercroft.storage.keys import Keys
from undercroft.store.datadir import DataDirectory
from undercroft.store.interface import Store

_FORK_LOOK, _FORK_LOOKS = 1.0, 30  # seconds, and how often at most forks are waited for

UID_BASE = 300_000
"""First of the user ids that QEMU processes run as when the daemon is root: an empty range beside
those of system users, containers and subordinate ids (systemd's UIDS-GIDS)."""


@dataclass
class Usage:
    """What the files of layers took when they were last looked at (``at``: a monotonic time)."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    taken: Mapping[str, int] | None = None
    at: float = 0.0


@dataclass
class Environment:
    """Handed to everything in this package. Times in seconds since 1970."""

    store: Store
    host: str
    directory: DataDirectory
    accelerator: Callable[[str], Awaitable[str]]
    """Gives the accelerator to use (``kvm`` or ``tcg``) for guests of an architecture."""
    clock: Callable[[], float] = time.time
    privileged: bool = field(default_factory=lambda: os.geteuid() == 0)
    start_slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(max(4, 2 * (os.cpu_count() or 1)))
    )
    uid_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    images_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the content of an image is removed, or found to be there and written down."""
    layers_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while layers are found to be needed by nobody and removed, and while one is taken into
    use that was there before."""
    held: set[str] = field(default_factory=set)
    """Layers that are made before they are taken into use, and must not go until then."""
    templates: asyncio.Condition = field(default_factory=asyncio.Condition)
    """Notified when a template is finished or given up."""
    usage: Usage = field(default_factory=Usage)
    forks: int = 0
    """Guests that are being forked just now."""
    wish: Callable[[str, str], None] = lambda vm, key: None
    """Told of a VM (id) that booted, and could have gone on from a warm template with this key."""
    serving: set[str] = field(default_factory=set)
    """What the QEMUs are marked with that serve layers to be read, or restored to."""
    used: Callable[[str], None] = lambda template: None
    """Told of a template (id) that a VM went on from."""
    closing: bool = False
    _emulators: dict[str, Emulator] = field(default_factory=dict)

    async def no_forks(self) -> None:
        """Returns when no guests are being forked, which have more need of the processors than
        what is done beside; or when that takes long."""
        for _ in range(_FORK_LOOKS):
            if not self.forks:
                break
            await asyncio.sleep(_FORK_LOOK)

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.directory.path

    def vm_directory(self, id: str) -> Path:
        """What of a VM outlives a run."""
        return self.directory.vm(id)

    def run_directory(self, id: str) -> Path:
        """A VM's sockets."""
        return self.directory.vm_run(id)

    def layer_path(self, id: str) -> Path:
        """The file of a layer."""
        return self.directory.layer(id)

    @property
    def keys(self) -> Keys:
        """The keys of encrypted layers."""
        return Keys(self.directory.keys)

    def snapshot_directory(self, snapshot: Snapshot) -> Path:
        """What belongs to a snapshot besides the layers of its disks."""
        return self.vm_directory(snapshot.spec.vm) / "snapshots" / snapshot.meta.id

    def template_directory(self, id: str) -> Path:
        """What belongs to a template besides the layers of its disks."""
        return self.directory.template(id)

    def suspended_path(self, id: str) -> Path:
        """The saved state of a suspended VM."""
        return self.vm_directory(id) / "suspend.state"

    @property
    def tmp(self) -> Path:
        """Where half-made things are; on the same file system as all else."""
        return self.directory.tmp

    async def emulator(self, arch: str) -> Emulator:
        """QEMU for an architecture, asked for its version once.

        Raises:
            MissingToolError, UnsupportedError: not installed, or too old.
        """
        found = self._emulators.get(arch)
        if found is None or not os.path.exists(found.path):
            found = self._emulators[arch] = await find_emulator(arch)
        return found
