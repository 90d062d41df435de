"""What the end of a machine means: its reason, whether the VM is started again, and when. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.machine import ExitReport
from undercroft.model.base import Ref
from undercroft.model.event import EventLevel
from undercroft.model.task import TaskSpec
from undercroft.model.vm import VM, Exit, ExitReason, Power, RestartPolicy

MAX_RESTARTS = 5
STEADY = 600.0  # seconds of running after which earlier restarts are forgotten
LONGEST_BACKOFF = 60.0

_REASONS = {
    "guest-shutdown": ExitReason.GUEST_SHUTDOWN,
    "guest-panic": ExitReason.GUEST_PANIC,
    "quit": ExitReason.FORCED,
    "killed": ExitReason.FORCED,
    "suspended": ExitReason.SUSPENDED,
    "signal": ExitReason.KILLED,
    "error": ExitReason.CRASHED,
    "unknown": ExitReason.LOST,
}
_CRASH_SIGNALS = frozenset({4, 5, 6, 7, 8, 11, 31})  # ILL TRAP ABRT BUS FPE SEGV SYS: signal(7)
_WORDS = {
    ExitReason.GUEST_SHUTDOWN: "shut itself down",
    ExitReason.GUEST_PANIC: "panicked",
    ExitReason.FORCED: "was switched off",
    ExitReason.SUSPENDED: "was suspended",
    ExitReason.KILLED: "was killed from outside",
    ExitReason.CRASHED: "ended because QEMU crashed",
    ExitReason.LOST: "ended while nobody watched",
}
_EVENTS = {
    ExitReason.GUEST_SHUTDOWN: "vm.shutdown",
    ExitReason.GUEST_PANIC: "vm.panicked",
    ExitReason.KILLED: "vm.killed",
    ExitReason.CRASHED: "vm.crashed",
    ExitReason.LOST: "vm.lost",
}


@dataclass(frozen=True)
class End:
    """The end of a run, as it is written down and told."""

    exit: Exit

    @property
    def event(self) -> str:
        """The type of event that tells of it."""
        return _EVENTS.get(self.exit.reason, "vm.stopped")

    @property
    def level(self) -> EventLevel:
        """How bad it is."""
        return EventLevel.ERROR if self.exit.reason.failure else EventLevel.INFO

    def describe(self, vm: VM) -> str:
        """What happened, in words."""
        text = f"{vm.label} {_WORDS.get(self.exit.reason, 'stopped')}"
        if self.exit.signal is not None:
            text += f" (signal {self.exit.signal})"
        elif self.exit.code:
            text += f" (exit code {self.exit.code})"
        if self.exit.message:
            text += f": {self.exit.message}"
        return text


def explain(report: ExitReport) -> End:
    """The reason behind a machine's exit report. A signal that a fault raises means a crash."""
    reason = _REASONS.get(report.hint, ExitReason.LOST)
    if reason is ExitReason.KILLED and report.signal in _CRASH_SIGNALS:
        reason = ExitReason.CRASHED
    return End(
        Exit(
            reason=reason,
            time=report.time,
            code=report.code,
            signal=report.signal,
            message=report.message,
        )
    )


def lost(now: float) -> End:
    """The end of a machine that was gone when the daemon came back."""
    return End(Exit(reason=ExitReason.LOST, time=now))


def suspended(now: float) -> End:
    """The end of a machine whose state was saved just before the daemon went."""
    return End(Exit(reason=ExitReason.SUSPENDED, time=now))


def start_failure(now: float, message: str) -> Exit:
    """A start that came to nothing."""
    return Exit(reason=ExitReason.START_FAILED, time=now, message=message)


def restarts_so_far(vm: VM, now: float) -> int:
    """Automatic restarts that still count: none once a run has been steady."""
    instance = vm.status.instance
    if instance is not None and now - instance.started >= STEADY:
        return 0
    return vm.status.restarts


def should_restart(vm: VM, end: Exit, now: float) -> bool:
    """Whether the VM's policy has it started again after this end."""
    if end.reason in (ExitReason.STOPPED, ExitReason.FORCED, ExitReason.SUSPENDED) or vm.tasks:
        return False
    if vm.spec.power is not Power.RUNNING:
        return False  # it was paused: what it was doing cannot be had again
    if restarts_so_far(vm, now) >= MAX_RESTARTS:
        return False
    policy = vm.spec.restart
    if policy is RestartPolicy.ALWAYS:
        return True
    return policy is RestartPolicy.ON_FAILURE and end.reason.failure


def backoff(restarts: int) -> float:
    """Seconds to wait before restart number ``restarts`` (from 0): 1, 2, 4, … at most 60."""
    return float(min(2.0**restarts, LONGEST_BACKOFF))


def restart_spec(vm: VM, host: str) -> TaskSpec:
    """The start that the agent does by itself."""
    return TaskSpec(verb="vm.start", object=Ref.to(vm), host=host)
