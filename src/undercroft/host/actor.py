"""One actor per VM: carries out its tasks one at a time, and keeps it as it should be.

An actor reads the VM's record, does the first task of its queue, and when there is none makes
reality match the spec: sees to a machine that ended by itself, and starts one that should run.
Every step can be repeated, because any step can be cut off by a crash of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from undercroft.host import exits
from undercroft.host.environment import Environment
from undercroft.host.observer import Observer
from undercroft.host.outcome import TaskRun, change_spec, change_status, finish, write
from undercroft.hypervisor.machine import ExitReport, MachineEvent, QemuMachine, RunState
from undercroft.model.errors import CancelledTaskError, UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.task import Task
from undercroft.model.vm import VM, Power, VMState
from undercroft.operations.context import new_event
from undercroft.store.interface import Delete, Put, Release

log = structlog.get_logger(__name__)

RETRY_ADOPTION = 10.0  # seconds between two tries to reach a machine that does not answer

Extra = Callable[[VM], tuple[list[Put], list[Delete], list[Release]]]


@dataclass
class Outcome:
    """What a verb leaves behind: a change of the record (to None: it is gone), and an event."""

    change: Callable[[VM], VM | None]
    event: str | None = None
    message: str = ""
    level: EventLevel = EventLevel.INFO
    result: dict[str, Any] = field(default_factory=dict)
    extra: Extra | None = None


Verb = Callable[["VMActor", VM, TaskRun], Awaitable[Outcome]]


class VMActor:
    """Owner of one VM's process. ``machine`` is None while there is none."""

    def __init__(self, environment: Environment, id: str, verbs: dict[str, Verb]) -> None:
        self.environment = environment
        self.id = id
        self.machine: QemuMachine | None = None
        self.unreachable = False
        self._busy = False
        self._verbs = verbs
        self._exit: asyncio.Task[ExitReport] | None = None
        self._wake = asyncio.Event()
        self._wake.set()
        self._running: asyncio.Task[Outcome] | None = None
        self._running_id: str | None = None
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
        self._cancelled.add(task_id)
        if self._running is not None and self._running_id == task_id:
            self._running.cancel()

    @property
    def ended(self) -> bool:
        """Whether the VM is gone and the actor with it."""
        return self._ended

    @property
    def accounts_for_process(self) -> bool:
        """Whether a process of this VM is known, or may just be coming or going."""
        return self.machine is not None or self.unreachable or self._busy

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
        try:
            machine = await QemuMachine.adopt(
                vm.status.instance,
                environment.run_directory(self.id),
                environment.vm_directory(self.id),
                on_event=self.on_event,
            )
        except UndercroftError as error:
            log.warning("does not answer", vm=vm.meta.name, error=error.message)
            self.unreachable = True
            return
        self.unreachable = False
        if machine is None:
            return
        self.take(machine)
        instance = machine.instance
        log.info("adopted", vm=vm.meta.name, pid=instance.pid)

        def change(record: VM) -> VM:
            record = change_status(record, instance=instance)
            if record.status.state in (VMState.REMOVING, VMState.STOPPING, VMState.CREATING):
                return record
            return change_status(record, state=self.present_state(record), message=None)

        await write(environment, VM, self.id, change)

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
            if self.unreachable:
                await self.adopt(vm)
                if self.unreachable:
                    return RETRY_ADOPTION
            if not vm.tasks or (self._exit is not None and self._exit.done()):
                pause = await self._reconcile(vm)
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
        if task.spec.cancel or task_id in self._cancelled:
            await self._cancelled_outcome(vm, run)
            return
        verb = self._verbs.get(task.spec.verb)
        if verb is None:
            error = UndercroftError(f"nobody knows how to do {task.spec.verb}", object=vm.label)
            await self._failed(vm, run, error)
            return
        self._running_id = task_id
        self._running = asyncio.create_task(_carry_out(verb, self, vm, run), name=task.spec.verb)
        try:
            outcome = await asyncio.shield(self._running)
        except asyncio.CancelledError:
            if self._running.cancelled() or task_id in self._cancelled:
                await self._cancelled_outcome(vm, run)
                return
            self._running.cancel()  # the daemon is closing: the task stays for the next one
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._running
            raise
        except CancelledTaskError:
            await self._cancelled_outcome(vm, run)
        except UndercroftError as error:
            await self._failed(vm, run, error)
        except Exception as error:
            log.exception("task failed", task=task_id, verb=task.spec.verb, vm=self.id)
            await self._failed(vm, run, _unexpected(error, vm))
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
        finally:
            self._running = self._running_id = None
            self._cancelled.discard(task_id)

    async def _failed(self, vm: VM, run: TaskRun, error: UndercroftError) -> None:
        verb = run.task.spec.verb
        log.warning("task failed", task=run.id, verb=verb, vm=vm.meta.name, error=error.message)
        if verb == "vm.create":
            await self._undo_creation(run, error=error)
            return
        await finish(
            self.environment,
            VM,
            self.id,
            run.id,
            error=error,
            change=lambda v: self._settled(v, message=error.message),
            event=(f"{verb}.failed", f"{vm.label}: {error.message}", EventLevel.ERROR),
        )

    async def _cancelled_outcome(self, vm: VM, run: TaskRun) -> None:
        verb = run.task.spec.verb
        if verb == "vm.create" and vm.status.state is VMState.CREATING:
            await self._undo_creation(run, cancelled=True)
            return
        await finish(
            self.environment,
            VM,
            self.id,
            run.id,
            cancelled=True,
            change=self._settled,
            event=(f"{verb}.cancelled", f"{vm.label}: {verb} was cancelled", EventLevel.INFO),
        )

    async def _undo_creation(
        self, run: TaskRun, error: UndercroftError | None = None, cancelled: bool = False
    ) -> None:
        """A VM that could not be created leaves nothing behind; one that was created but would not
        start stays, switched off."""
        found = await self.environment.store.get(VM, self.id)
        if found is None:
            return
        if found.record.status.state is not VMState.CREATING:
            label = found.record.label
            told = f"{label} was created but did not start: {error.message if error else ''}"
            await finish(
                self.environment,
                VM,
                self.id,
                run.id,
                error=error,
                cancelled=cancelled,
                change=lambda v: self._settled(v, message=error.message if error else None),
                event=("vm.start.failed", told, EventLevel.ERROR),
            )
            return
        removal = await self._verbs["vm.remove"](self, found.record, run)
        waiting = found.record.tasks
        message = "was cancelled" if cancelled else f"failed: {error.message if error else ''}"
        await finish(
            self.environment,
            VM,
            self.id,
            run.id,
            error=error,
            cancelled=cancelled,
            change=removal.change,
            extra=removal.extra,
            event=(
                "vm.create.failed",
                f"making {found.record.label} {message}",
                EventLevel.INFO if cancelled else EventLevel.ERROR,
            ),
        )
        for id in waiting:
            if id != run.id:
                await finish(
                    self.environment, VM, self.id, id, cancelled=True, change=lambda v: None
                )

    def _settled(self, vm: VM, message: str | None = None) -> VM:
        """The record after something did not come about: it says what is, and if nothing else is
        waiting also wants what is, so that nothing happens behind the user's back."""
        state = self.present_state(vm)
        vm = change_status(
            vm,
            state=state,
            message=message,
            instance=self.machine.instance if self.machine is not None else None,
        )
        if vm.tasks:
            return vm
        power = {
            VMState.RUNNING: Power.RUNNING,
            VMState.PAUSED: Power.PAUSED,
            VMState.SUSPENDED: Power.SUSPENDED,
        }.get(state, Power.STOPPED)
        return change_spec(vm, power=power)

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

    def take(self, machine: QemuMachine) -> None:
        """Owns a machine that was started or adopted: watches it and its end."""
        self.machine = machine
        self._exit = asyncio.create_task(machine.wait_exit(), name=f"exit {self.id}")
        self._exit.add_done_callback(lambda _: self.wake())
        self._observer.watch(machine)

    def on_event(self, event: MachineEvent) -> None:
        """Called by the machine when something happens in it."""
        self._observer.on_event(event)

    async def exited(self, timeout: float | None) -> ExitReport | None:
        """Waits for the machine to end; None if it has not after ``timeout`` seconds."""
        if self._exit is None:
            return None
        done, _ = await asyncio.wait({self._exit}, timeout=timeout)
        return self._exit.result() if done else None

    def release(self) -> None:
        """Forgets a machine that has ended."""
        self._observer.close()
        self.machine = None
        self._exit = None

    # -- keeping it as it should be ---------------------------------------------------------

    async def _reconcile(self, vm: VM) -> float:
        if self._exit is not None and self._exit.done():
            report = self._exit.result()
            self.release()
            return await self._see_to_exit(vm, exits.explain(report))
        if self.machine is not None:
            return 0.0
        if vm.status.state.alive or vm.status.instance is not None:
            return await self._see_to_exit(vm, exits.lost(self.environment.clock()))
        if vm.status.state is VMState.CREATING:
            return 0.0
        if vm.spec.power is Power.RUNNING and vm.status.state is not VMState.FAILED:
            return await self._start_again(vm)
        return 0.0

    async def _see_to_exit(self, vm: VM, end: exits.End) -> float:
        now = self.environment.clock()
        again = exits.should_restart(vm, end.exit, now)

        def change(record: VM) -> VM:
            restarts = exits.restarts_so_far(record, now)
            record = change_status(
                record,
                state=VMState.STOPPED,
                instance=None,
                last_exit=end.exit,
                addresses=(),
                agent=None,
                message=end.exit.message or None,
                restarts=restarts + 1 if again else restarts,
            )
            if not again and not record.tasks:
                record = change_spec(record, power=Power.STOPPED)
            return record

        await write(
            self.environment,
            VM,
            self.id,
            change,
            lambda v: [new_event(now, end.event, v, end.describe(v), level=end.level)],
        )
        if again:
            self.wake()
            return exits.backoff(exits.restarts_so_far(vm, now))
        return 0.0

    async def _start_again(self, vm: VM) -> float:
        """Starts a VM that should run: after a failure, a restart of the host, or a crash of the
        daemon just before."""
        now = self.environment.clock()
        last = vm.status.last_exit
        if last is not None and vm.status.restarts > 0:
            due = last.time + exits.backoff(vm.status.restarts - 1)
            if now < due:
                return due - now
        task = Task(
            meta=vm.meta, spec=exits.restart_spec(vm, self.environment.host)
        )  # never written: it only carries the arguments
        try:
            outcome = await self._verbs["vm.start"](self, vm, TaskRun(self.environment, task))
        except UndercroftError as error:
            message = error.message
            again = vm.status.restarts < exits.MAX_RESTARTS

            def change(record: VM) -> VM:
                record = change_status(
                    record,
                    state=VMState.STOPPED,
                    instance=None,
                    message=message,
                    restarts=record.status.restarts + 1,
                    last_exit=exits.start_failure(now, message),
                )
                if not again and not record.tasks:
                    record = change_spec(record, power=Power.STOPPED)
                return record

            await write(
                self.environment,
                VM,
                self.id,
                change,
                lambda v: [
                    new_event(
                        now,
                        "vm.restart.failed",
                        v,
                        f"{v.label} could not be started again: {message}",
                        level=EventLevel.ERROR,
                    )
                ],
            )
            return exits.backoff(vm.status.restarts) if again else 0.0
        await write(
            self.environment,
            VM,
            self.id,
            outcome.change,
            lambda v: [new_event(now, "vm.restarted", v, f"{v.label} was started again by itself")],
        )
        return 0.0


async def _carry_out(verb: Verb, actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    await run.begin()
    return await verb(actor, vm, run)


def _without(vm: VM, task_id: str) -> VM:
    return msgspec.structs.replace(vm, tasks=tuple(t for t in vm.tasks if t != task_id))


def _unexpected(error: Exception, vm: VM) -> UndercroftError:
    return UndercroftError(
        f"{type(error).__name__}: {error}",
        object=vm.label,
        action="this is a fault of Undercroft's own; the daemon's log has the details",
    )
