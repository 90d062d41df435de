"""Keeps VMs held ready on the templates that were used last: their QEMU has started and loaded
what it goes on from, which is a third of the time that an instant clone takes.

They go when nobody wanted one for a while, with their template, and where memory runs short. A
daemon that begins removes those of the one before.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from undercroft.host.environment import Environment
from undercroft.host.memory import free_memory
from undercroft.model.errors import UndercroftError
from undercroft.model.template import Template
from undercroft.model.units import GiB
from undercroft.model.vm import VM, VMState
from undercroft.operations.context import Context
from undercroft.operations.held import POOL, prepare
from undercroft.operations.vm_change import discard

log = structlog.get_logger(__name__)

SIZE = 2  # on each template
TEMPLATES = 2  # on which VMs are held
IDLE = 300.0  # seconds after its last use that a template's go
QUIET = 1.5  # seconds after a use until the next is made ready
LOOK = 0.2
TEND = 30.0
MEMORY = GiB  # that must be free


class Pool:
    """`run` it as long as the daemon lives."""

    def __init__(self, environment: Environment, context: Context, size: int = SIZE) -> None:
        self._environment = environment
        self._context = context
        self._size = size
        self._used: dict[str, float] = {}  # template → when
        self._held: dict[str, list[str]] = {}  # template → VMs, made or being made
        self._wake = asyncio.Event()

    def used(self, template: str) -> None:
        """A VM went on from a template (an id) that may be wanted again."""
        if self._size:
            self._used[template] = self._environment.clock()
            self._wake.set()

    def gone(self, template: str) -> None:
        """A template (an id) was removed."""
        if template in self._held:
            self._wake.set()

    def held(self, template: str) -> list[str]:
        """The VMs (ids) that wait on a template, or did until just now."""
        return list(self._held.get(template, ()))

    async def run(self) -> None:
        """Makes and removes them until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TEND if self._held else None):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(QUIET)
            if self._environment.forks:
                self._wake.set()  # later
                continue
            try:
                await self._tend()
            except UndercroftError as error:
                log.warning("tending the pool failed", error=error.message)
            except Exception:
                log.exception("tending the pool failed")

    async def _tend(self) -> None:
        now = self._environment.clock()
        recent = sorted(self._used, key=self._used.__getitem__, reverse=True)
        wanted = [t for t in recent[:TEMPLATES] if now < self._used[t] + IDLE]
        if await asyncio.to_thread(free_memory) < MEMORY:
            wanted = []
        self._used = {id: self._used[id] for id in wanted}
        for template in list(self._held):
            found = await self._context.store.get(Template, template)
            gone = found is None or template not in wanted
            await self._sort_out(template, gone)
        for template in wanted:
            await self._fill(template)

    async def _sort_out(self, template: str, gone: bool) -> None:
        """Forgets those that were taken; removes those that are of no use any more."""
        kept = []
        for id in self._held[template]:
            found = await self._context.store.get(VM, id)
            if found is None or not found.record.spec.passing:
                continue
            vm = found.record
            ready = vm.tasks or (vm.status.held and vm.status.state is VMState.CREATING)
            if gone or not ready:
                await discard(self._context, POOL, id)
            else:
                kept.append(id)
        self._held[template] = kept
        if not kept:
            del self._held[template]

    async def _fill(self, template: str) -> None:
        found = await self._context.store.get(Template, template)
        if found is None:
            return
        while len(self._held.get(template, ())) < self._size and not self._environment.forks:
            vm = await prepare(self._context, found.record)
            if vm is None:
                return
            self._held.setdefault(template, []).append(vm.meta.id)
            if not await self._ready(vm.meta.id):
                self._used.pop(template, None)  # whatever is wrong, it would be wrong again
                return

    async def _ready(self, id: str) -> bool:
        """Waits until it has been made; whether it was."""
        while True:
            found = await self._context.store.get(VM, id)
            if found is None:
                return False
            if not found.record.tasks or not found.record.spec.passing:
                return bool(found.record.status.held) or not found.record.spec.passing
            await asyncio.sleep(LOOK)
