"""One actor per VM: carries out its tasks one at a time, and keeps it as it should be.

An actor reads the VM's record, does the first task of its queue, and when there is none makes
reality match the spec: sees to a machine that ended by itself, and starts one that should run.
Every step can be repeated, because any step can be cut off by a crash of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from undercroft.host import orphans
from undercroft.host.environment import Environment
from undercroft.host.failure import settle_failure
from undercroft.host.observer import Observer
from undercroft.host.outcome import (
    TaskRun,
    change_status,
    finish,
    unexpected,
    write,
)
from undercroft.host.upkeep import reconcile
from undercroft.hypervisor.machine import ExitReport, MachineEvent, QemuMachine, RunState
from undercroft.hypervisor.state_file import discard_state
from undercroft.model.errors import CancelledTaskError, UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.task import Task
from undercroft.model.vm import VM, VMState
from undercroft.store.interface import Delete, Put, Release

log = structlog.get_logger(__name__)

RETRY_ADOPTION = 10.0  # seconds between two tries to reach a machine that does not answer

Extra = Callable[[VM], tuple[list[Put], list[Delete], list[Release]]]


@dataclass
class Outcome:
    """What a verb leaves behind: a change of the record (to None: it is gone), and an event;
    ``after``: what is done once that is written."""

    change: Callable[[VM], VM | None]
    event: str | None = None
    message: str = ""
    level: EventLevel = EventLevel.INFO
    result: dict[str, Any] = field(default_factory=dict)
    extra: Extra | None = None
    after: Callable[[], Awaitable[None]] | None = None


Verb = Callable[["VMActor", VM, TaskRun], Awaitable[Outcome]]


class VMActor:
    """Owner of one VM's process. ``machine`` is None while there is none; ``held``: it was started
    by us and waits to be told whose it is."""

    def __init__(self, environment: Environment, id: str, verbs: dict[str, Verb]) -> None:
        self.environment = environment
        self.id = id
        self.machine: QemuMachine | None = None
        self.held = False
        self.unreachable = False
        self._busy = False
        self.verbs = verbs
        self._exit: asyncio.Task[ExitReport] | None = None
        self._wake = asyncio.Event()
        self._wake.set()
        self._running: asyncio.Task[Outcome] | None = None
        self._run_now: TaskRun | None = None
        self._cancelled: set[str] = set()
        self._observer = Observer(environment, id)
        self._ended = False
        self._loop_task: asyncio.Task[None] | None = None

    # -- life of the actor ------------------------------------------------------------------

    def launch(self) -> None:
        """Begins to act."""
        self._loop_task = asyncio.create_task(self._run(), name=f"actor {self.id}")

    def wake(self) -> None:
        """Something may have changed."""
        self._wake.set()

    def cancel_task(self, task_id: str) -> None:
        """Stops a task: at once if it runs, else when its turn comes."""
        if task_id in self._cancelled:
            return  # a second time would cut short how it puts things back
        self._cancelled.add(task_id)
        run, running = self._run_now, self._running
        if run is None or running is None or run.id != task_id:
            return
        if run.committed:
            run.hurry.set()
        else:
            running.cancel()

    @property
    def ended(self) -> bool:
        """Whether the VM is gone and the actor with it."""
        return self._ended

    @property
    def accounts_for_process(self) -> bool:
        """Whether a process of this VM is known, or may just be coming or going."""
        coming_or_going = self._busy and not self._ended
        return self.machine is not None or self.unreachable or coming_or_going

    async def close(self) -> None:
        """Lets go of the VM, which runs on."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        self._observer.close()
        if self._exit is not None:
            self._exit.cancel()
        if self.machine is not None:
            await self.machine.detach()
            self.machine = None

    async def _run(self) -> None:
        pause = 0.0
        while not self._ended:
            try:
                self._busy = False
                await self._wait(pause)
                self._busy = True
                pause = await self._step()
            except UndercroftError as error:
                log.error("actor failed", vm=self.id, code=error.code, error=error.message)
                pause = 5.0
            except Exception:
                log.exception("actor failed", vm=self.id)
                pause = 5.0

    async def adopt(self, vm: VM) -> None:
        """Takes over the machine that an earlier daemon started, if it still runs.

        One that runs but whose monitor does not answer is left alone and tried again: it may only
        be waiting for a slow disk.
        """
        environment = self.environment
        if not (environment.run_directory(self.id) / "qmp.sock").exists():
            self.unreachable = False
            return
        try:
            machine = await QemuMachine.adopt(
                vm.status.instance,
                environment.run_directory(self.id),
                environment.vm_directory(self.id),
                on_event=self.on_event,
            )
        except (UndercroftError, OSError) as error:
            log.warning("does not answer", vm=vm.meta.name, error=str(error))
            self.unreachable = True
            return
        self.unreachable = False
        if machine is None:
            return
        if machine.run_state is RunState.INCOMING:  # its guest has not run: the saved state counts
            await machine.quit()
            return
        await asyncio.to_thread(discard_state, environment.suspended_path(self.id))
        self.take(machine)
        instance = machine.instance
        log.info("adopted", vm=vm.meta.name, pid=instance.pid)

        def change(record: VM) -> VM:
            record = change_status(record, instance=instance)
            if record.status.state in (VMState.REMOVING, VMState.STOPPING, VMState.CREATING):
                return record
            state = self.present_state(record)
            message = record.status.message if state is VMState.PAUSED else None
            return change_status(record, state=state, message=message)

        await write(environment, VM, self.id, change)

    async def _reach(self, vm: VM) -> bool:
        """Tries again to take over a machine that did not answer; kills it if somebody waits for
        its end by force."""
        await self.adopt(vm)
        for id in vm.tasks:
            task = await self.environment.store.get(Task, id)
            if not self.unreachable:
                break
            if task is None or task.record.spec.cancel:
                continue
            spec = task.record.spec
            if spec.verb == "vm.remove" or spec.arguments.get("force"):
                data = self.environment.data
                await asyncio.to_thread(orphans.end_machine, data, self.id)
                self.unreachable = False
        return not self.unreachable

    async def _wait(self, pause: float) -> None:
        """Waits until woken; if ``pause`` is positive, at most that many seconds."""
        try:
            async with asyncio.timeout(pause or None):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _step(self) -> float:
        """Does what is to be done; returns after how many seconds to look again (0: when woken)."""
        while True:
            found = await self.environment.store.get(VM, self.id)
            if found is None:
                self._ended = True
                self._observer.close()
                return 0.0
            vm = found.record
            self._cancelled &= set(vm.tasks)
            if self.unreachable and not await self._reach(vm):
                return RETRY_ADOPTION
            if not vm.tasks or (self._exit is not None and self._exit.done()):
                pause = await reconcile(self, vm)
                if not vm.tasks:
                    return pause
            else:
                await self._do_task(vm, vm.tasks[0])

    # -- tasks ------------------------------------------------------------------------------

    async def _do_task(self, vm: VM, task_id: str) -> None:
        found = await self.environment.store.get(Task, task_id)
        if found is None or found.record.status.state.final:
            await write(self.environment, VM, self.id, lambda v: _without(v, task_id))
            return
        task = found.record
        run = TaskRun(self.environment, task)
        cancel = task.spec.cancel or task_id in self._cancelled
        if task.spec.verb == "vm.create" and vm.status.state is VMState.REMOVING:
            cancel = True  # it was given up
        if cancel and not run.committed:
            await settle_failure(self, vm, run)
            return
        if cancel:
            run.hurry.set()
        verb = self.verbs.get(task.spec.verb)
        if verb is None:
            error = UndercroftError(f"nobody knows how to do {task.spec.verb}", object=vm.label)
            await settle_failure(self, vm, run, error)
            return
        try:
            outcome = await self._carried_out(verb, vm, run)
        except UndercroftError as error:
            if task_id in self._cancelled and isinstance(error, CancelledTaskError):
                await settle_failure(self, vm, run)
            else:
                await settle_failure(self, vm, run, error)
        else:
            await finish(
                self.environment,
                VM,
                self.id,
                task_id,
                change=outcome.change,
                result=outcome.result,
                extra=outcome.extra,
                event=(outcome.event, outcome.message, outcome.level) if outcome.event else None,
            )
            if outcome.after is not None:
                await outcome.after()

    async def _carried_out(self, verb: Verb, vm: VM, run: TaskRun) -> Outcome:
        """Runs a verb in an asyncio task of its own, which `cancel_task` can cancel alone.

        Raises:
            CancelledTaskError: it was. UndercroftError: it failed.
            CancelledError: the daemon is closing; the task stays for the next one.
        """
        self._run_now = run
        self._running = running = asyncio.create_task(
            _carry_out(verb, self, vm, run), name=run.task.spec.verb
        )
        try:
            await asyncio.wait({running})  # leaves it alone if we are cancelled ourselves
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.wait({running})
            if not running.cancelled():
                running.exception()  # seen: the next daemon begins anew
            raise
        finally:
            self._run_now, self._running = None, None
        try:
            return running.result()
        except asyncio.CancelledError:
            if run.id in self._cancelled:
                raise CancelledTaskError("the task was cancelled") from None
            error: Exception = UndercroftError("it was interrupted", object=vm.label)
        except UndercroftError:
            raise
        except Exception as caught:
            error = caught
        log.error("task failed", task=run.id, vm=self.id, exc_info=error)
        raise unexpected(error, vm) from error

    def present_state(self, vm: VM) -> VMState:
        """What the VM is doing, seen from its machine."""
        if self.machine is None:
            if self.environment.suspended_path(self.id).exists():
                return VMState.SUSPENDED
            return VMState.STOPPED
        if self.machine.run_state in (RunState.PAUSED, RunState.IO_ERROR):
            return VMState.PAUSED
        return VMState.RUNNING

    # -- the machine ------------------------------------------------------------------------

    def take(self, machine: QemuMachine, *, quietly: bool = False) -> None:
        """Owns a machine that was started or adopted: watches it and its end. ``quietly``: leaves
        its guest agent alone until `look`."""
        self.machine = machine
        self._exit = asyncio.create_task(machine.wait_exit(), name=f"exit {self.id}")
        self._exit.add_done_callback(lambda _: self.wake())
        self._observer.watch(machine, quietly=quietly)

    def look(self, *, after: float = 0.0) -> None:
        """Has the guest agent of a machine that was taken quietly looked at from now on, or
        ``after`` so many seconds, when others that are forked just then are there."""
        self._observer.look(after=after)

    def guard(self) -> None:
        """Sees to the room for the machine's disks, after one has come."""
        self._observer.guard()

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Does something for the machine beside everything else; it ends with the machine."""
        return self._observer.spawn(work)

    def on_event(self, event: MachineEvent) -> None:
        """Called by the machine when something happens in it."""
        self._observer.on_event(event)

    def ended_report(self) -> ExitReport | None:
        """How the machine ended, if it has."""
        if self._exit is None or not self._exit.done():
            return None
        return self._report(self._exit)

    async def exited(self, timeout: float | None) -> ExitReport | None:
        """Waits for the machine to end; None if it has not after ``timeout`` seconds."""
        if self._exit is None:
            return None
        done, _ = await asyncio.wait({self._exit}, timeout=timeout)
        return self._report(self._exit) if done else None

    def _report(self, exit: asyncio.Task[ExitReport]) -> ExitReport:
        error = exit.exception()
        if error is not None:  # it has ended, but watching it went wrong
            log.error("watching a VM failed", vm=self.id, exc_info=error)
            return ExitReport(hint="unknown", time=self.environment.clock())
        return exit.result()

    def release(self) -> None:
        """Forgets a machine that has ended."""
        self._observer.close()
        self.machine = None
        self._exit = None


async def _carry_out(verb: Verb, actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    await run.begin()
    return await verb(actor, vm, run)


def _without(vm: VM, task_id: str) -> VM:
    return msgspec.structs.replace(vm, tasks=tuple(t for t in vm.tasks if t != task_id))
