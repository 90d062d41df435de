"""Which accelerator guests of this host get: probed once, in the background of the start."""

from __future__ import annotations

import asyncio
import platform
from pathlib import Path

import structlog

from undercroft.hypervisor.accelerator import Acceleration, probe
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.installed import installed_emulators
from undercroft.model.errors import UndercroftError
from undercroft.model.host import AcceleratorStatus

log = structlog.get_logger(__name__)

_NATIVE = {"x86_64": ("x86_64", "i386"), "aarch64": ("aarch64",)}


class HostAcceleration:
    """The answers of the probe, as soon as it has them."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._probing: asyncio.Task[Acceleration | None] | None = None
        self._emulators: asyncio.Task[tuple[Emulator, ...]] | None = None

    def begin(self) -> None:
        """Begins to look."""
        self._emulators = asyncio.create_task(installed_emulators(self._cache))
        self._probing = asyncio.create_task(self._probe(self._emulators))

    async def _probe(self, emulators: asyncio.Task[tuple[Emulator, ...]]) -> Acceleration | None:
        try:
            for emulator in await emulators:
                if emulator.arch == "x86_64":
                    return await probe(emulator, self._cache)
        except (UndercroftError, OSError) as error:  # emulation works all the same
            log.warning("looking for accelerators failed", error=str(error))
        return None

    async def emulators(self) -> tuple[Emulator, ...]:
        """The emulators that are installed."""
        return await asyncio.shield(self._emulators) if self._emulators is not None else ()

    async def statuses(self) -> tuple[AcceleratorStatus, ...]:
        """What works, and why the rest does not."""
        found = await self._found()
        return found.statuses if found is not None else ()

    async def choose(self, arch: str) -> str:
        """``kvm`` if it works for guests of this architecture, else ``tcg``."""
        if arch not in _NATIVE.get(platform.machine(), ()):
            return "tcg"
        found = await self._found()
        return "kvm" if found is not None and found.kvm.available else "tcg"

    async def _found(self) -> Acceleration | None:
        return await asyncio.shield(self._probing) if self._probing is not None else None

    async def close(self) -> None:
        """Stops looking."""
        tasks = [task for task in (self._probing, self._emulators) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
