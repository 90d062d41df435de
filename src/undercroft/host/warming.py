"""Makes warm templates: boots an image once more, as nobody's VM, and keeps what is in memory then.

One at a time, when the VM that it is for has settled, at the lowest priority, and only where memory
and disk have room to spare. What a killed daemon leaves of it is removed by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from undercroft.host.environment import Environment
from undercroft.host.identity import read_facts
from undercroft.host.memory import free_memory
from undercroft.host.pool import SIZE
from undercroft.hypervisor.machine import QemuMachine
from undercroft.model.errors import (
    DataError,
    NotFoundError,
    StaleError,
    TimeLimitError,
    UndercroftError,
)
from undercroft.model.image import Image
from undercroft.model.task import Task, TaskState
from undercroft.model.template import Template
from undercroft.model.units import parse_size
from undercroft.model.vm import VM
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import ATTEMPTS, Context, new_event
from undercroft.operations.templates import TemplateOperations
from undercroft.operations.vm_change import discard
from undercroft.operations.warm import begin, find_warm, keep, warm_templates
from undercroft.store.interface import Put, Transaction

log = structlog.get_logger(__name__)

LOOK = 1.0  # seconds between looks at something that takes minutes
PATIENCE = 1800.0  # seconds for a guest to boot, under emulation on a busy host
AGAIN_AFTER = 3600.0  # seconds until what failed is tried again
NICE = 15
MEMORY_SPARE = 256 << 20  # bytes that must be left when it is made
MEMORY_PART = 4  # beside a quarter more than the guest's own, for QEMU

# Ends when the guest has booted: what is done only once must be over.
_SETTLE = """
PATH=/usr/sbin:/usr/bin:/sbin:/bin
command -v cloud-init > /dev/null && cloud-init status --wait > /dev/null
[ -d /run/systemd/system ] && systemctl is-system-running --wait > /dev/null
sync
"""
_BREATH = 3.0  # seconds for what the end of the boot sets off


@dataclass(frozen=True)
class Room:
    """What warm templates may take: ``count`` of them (0: none are made), ``disk`` bytes (None: a
    tenth of the file system); ``pool``: how many VMs are held ready on each that is in use."""

    count: int = 8
    disk: int | None = None
    pool: int = SIZE

    @classmethod
    def read(cls, text: str | None) -> Room:
        """From the daemon's setting ``CROFT_WARM``: ``off``, a number, or a size (``8G``).

        Raises:
            InvalidError: it is none of these.
        """
        if not text or text == "on":
            return cls()
        if text == "off":
            return cls(count=0, pool=0)
        if text.isdigit() and int(text) < 1000:
            return cls(count=int(text), pool=SIZE if int(text) else 0)
        return cls(count=1000, disk=parse_size(text))


class Warmer:
    """Makes what is wished for, one after the other. `run` it as long as the daemon lives."""

    def __init__(
        self,
        environment: Environment,
        context: Context,
        machine: Callable[[str], QemuMachine | None],
        room: Room,
    ) -> None:
        self._environment = environment
        self._context = context
        self._machine = machine
        self._room = room
        self._wishes: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._wanted: set[str] = set()
        self._failed: dict[str, float] = {}

    def wish(self, vm: str, key: str) -> None:
        """A VM (id) booted that could have gone on from a template with this key."""
        failed = self._failed.get(key)
        if failed is not None and self._environment.clock() < failed + AGAIN_AFTER:
            return
        if self._room.count > 0 and key not in self._wanted:
            self._wanted.add(key)
            self._wishes.put_nowait((vm, key))

    async def run(self) -> None:
        """Removes what an earlier daemon left half-made; then makes templates until cancelled."""
        for item in (await self._context.store.list(VM)).items:
            if item.record.spec.passing:
                await discard(self._context, SYSTEM, item.record.meta.id)
        while True:
            vm, key = await self._wishes.get()
            try:
                await self._warm(vm, key)
            except (UndercroftError, OSError) as error:
                log.warning("no warm template", key=key, error=str(error))
                self._failed[key] = self._environment.clock()
            except Exception:
                log.exception("no warm template", key=key)
                self._failed[key] = self._environment.clock()
            self._wanted.discard(key)

    async def _warm(self, id: str, key: str) -> None:
        if await find_warm(self._context, key) is not None:
            return
        source = await self._answers(id)
        if source is None:
            return
        memory = await asyncio.to_thread(free_memory)
        if memory < source.spec.memory * (MEMORY_PART + 1) // MEMORY_PART + MEMORY_SPARE:
            log.info("no memory for a warm template", key=key)
            return
        if not await self._make_room(source.spec.memory):
            log.info("no room for a warm template", key=key)
            return
        found = await self._context.store.get(Image, source.spec.image or "")
        if found is None:
            return
        vm = await begin(self._context, source, key)
        try:
            await self._keep(vm, found.record.meta.name, key)
        finally:
            if not self._environment.closing:
                await asyncio.shield(discard(self._context, SYSTEM, vm.meta.id))

    async def _keep(self, vm: VM, image: str, key: str) -> None:
        await self._answers(vm.meta.id, at_least=1.0)
        machine = self._machine(vm.meta.id)
        if machine is None or machine.agent is None:
            raise DataError("its guest did not boot", object=vm.label)
        await machine.agent.exec(["/bin/sh"], input=_SETTLE.encode(), timeout=PATIENCE, poll=LOOK)
        await asyncio.sleep(_BREATH)
        template, task = await self._wanted_template(vm, image, key)
        await self._done(task)
        directory = self._environment.template_directory(template.meta.id)
        if await asyncio.to_thread(read_facts, directory) is None:
            await self._drop(template)
            raise DataError("its guest could not be prepared", object=vm.label)
        told = f"{template.label} was made: croft run {image} goes on from it"
        event = new_event(self._environment.clock(), "template.created", template, told)
        await self._context.store.transact(Transaction(puts=[Put(event)]))

    async def _wanted_template(self, vm: VM, image: str, key: str) -> tuple[Template, Task]:
        for _ in range(ATTEMPTS):
            found = await self._context.store.get(VM, vm.meta.id)
            if found is None:
                break
            with contextlib.suppress(StaleError):
                return await keep(self._context, found, image, key)
        raise DataError(f"{vm.label} is gone", object=vm.label)

    async def _answers(self, id: str, at_least: float = 0.0) -> VM | None:
        """The VM, once its guest agent answers; None if it ends before."""
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE
        lowered: set[int] = set()
        while loop.time() < end:
            await asyncio.sleep(LOOK)
            found = await self._context.store.get(VM, id)
            if found is None:
                return None
            vm = found.record
            machine = self._machine(id)
            if vm.spec.passing and machine is not None and machine.instance.pid not in lowered:
                lowered.add(machine.instance.pid)
                await asyncio.to_thread(_lower_priority, machine.instance.pid)
            if vm.status.agent:
                return vm
            if not vm.tasks and not vm.status.state.alive:
                return None
        raise TimeLimitError(f"no agent answers in vm {id} within {PATIENCE:g} s")

    async def _done(self, task: Task) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE
        while loop.time() < end:
            await asyncio.sleep(LOOK)
            found = await self._context.store.get(Task, task.meta.id)
            status = found.record.status if found is not None else None
            if status is None or not status.state.final:
                continue
            if status.state is TaskState.SUCCEEDED:
                return
            raise DataError(status.error.detail if status.error else f"it was {status.state}")
        raise TimeLimitError(f"task {task.meta.id} takes longer than {PATIENCE:g} s")

    # -- room ---------------------------------------------------------------------------------

    async def shrink(self) -> None:
        """Removes the templates unused for longest, while they take more than they may."""
        await self._make_room(0)

    async def _make_room(self, more: int) -> bool:
        """Evicts the least recently used, until one of ``more`` bytes has room; whether it has."""
        kept = await asyncio.to_thread(
            _by_use, self._environment, [i.record for i in await warm_templates(self._context)]
        )
        while True:
            usage = os.statvfs(self._environment.data)
            total = usage.f_blocks * usage.f_frsize
            limit = self._room.disk if self._room.disk is not None else total // 10
            free = usage.f_bavail * usage.f_frsize - more
            count = len(kept) + (1 if more else 0)
            taken = sum(template.status.memory for template in kept) + more
            if count <= self._room.count and taken <= limit and free >= total // 20:
                return True
            if not kept:
                return False
            await self._drop(kept.pop(0))

    async def _drop(self, template: Template) -> None:
        log.info("a warm template goes", template=template.meta.name)
        with contextlib.suppress(NotFoundError):
            await TemplateOperations(self._context).remove(SYSTEM, template.meta.id)


def _by_use(environment: Environment, templates: list[Template]) -> list[Template]:
    """Templates that are ready, the one that was unused for longest first. Blocks."""

    def last(template: Template) -> float:
        try:
            return environment.template_directory(template.meta.id).stat().st_mtime
        except OSError:
            return 0.0

    return sorted((t for t in templates if t.status.shape is not None), key=last)


def _lower_priority(pid: int) -> None:
    """Has a process run only when nobody else wants to. Blocks."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), NICE)
