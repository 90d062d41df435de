"""What the end of a machine means."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.store.records import vm as some_vm
from undercroft.host import exits
from undercroft.hypervisor.machine import ExitReport
from undercroft.model.event import EventLevel
from undercroft.model.vm import VM, Exit, ExitReason, Instance, Power, RestartPolicy, VMState


def vm(
    policy: RestartPolicy = RestartPolicy.ON_FAILURE,
    restarts: int = 0,
    started: float = 1000.0,
    power: Power = Power.RUNNING,
    tasks: tuple[str, ...] = (),
) -> VM:
    record = some_vm()
    instance = Instance(
        pid=1,
        start_ticks=1,
        host_boot="",
        uid=0,
        started=started,
        accelerator="tcg",
        qemu="10.0",
        cpus=1,
        memory=1,
        generation=1,
    )
    return msgspec.structs.replace(
        record,
        spec=msgspec.structs.replace(record.spec, restart=policy, power=power),
        status=msgspec.structs.replace(
            record.status, state=VMState.RUNNING, restarts=restarts, instance=instance
        ),
        tasks=tasks,
    )


def end(reason: ExitReason) -> Exit:
    return Exit(reason=reason, time=1010.0)


@pytest.mark.parametrize(
    ("hint", "signal", "reason"),
    [
        ("guest-shutdown", None, ExitReason.GUEST_SHUTDOWN),
        ("guest-panic", None, ExitReason.GUEST_PANIC),
        ("quit", None, ExitReason.FORCED),
        ("killed", 9, ExitReason.FORCED),
        ("suspended", None, ExitReason.SUSPENDED),
        ("signal", 9, ExitReason.KILLED),
        ("signal", 15, ExitReason.KILLED),
        ("signal", None, ExitReason.KILLED),
        ("signal", 11, ExitReason.CRASHED),
        ("signal", 6, ExitReason.CRASHED),
        ("error", None, ExitReason.CRASHED),
        ("unknown", None, ExitReason.LOST),
        ("something new", None, ExitReason.LOST),
    ],
)
def test_reasons(hint: str, signal: int | None, reason: ExitReason) -> None:
    report = ExitReport(hint=hint, time=5.0, signal=signal, code=None, message="last words")
    explained = exits.explain(report)
    assert explained.exit == Exit(reason=reason, time=5.0, signal=signal, message="last words")
    assert (explained.level is EventLevel.ERROR) == reason.failure
    assert "last words" in explained.describe(vm())
    assert explained.event.startswith("vm.")


def test_every_hint_that_the_hypervisor_knows_has_a_reason() -> None:
    for hint in ("guest-shutdown", "guest-panic", "quit", "killed", "suspended", "signal", "error"):
        assert f"``{hint}``" in (ExitReport.__doc__ or "")
        assert exits.explain(ExitReport(hint=hint, time=0.0)).exit.reason is not ExitReason.LOST


def test_signal_and_code_are_told() -> None:
    killed = exits.End(Exit(reason=ExitReason.KILLED, time=0.0, signal=9))
    assert killed.describe(vm()) == "vm web1 was killed from outside (signal 9)"
    crashed = exits.End(Exit(reason=ExitReason.CRASHED, time=0.0, code=1))
    assert crashed.describe(vm()) == "vm web1 ended because QEMU crashed (exit code 1)"


FAILURES = [r for r in ExitReason if r.failure]
MEANT = [ExitReason.STOPPED, ExitReason.FORCED, ExitReason.SUSPENDED]


@pytest.mark.parametrize("reason", list(ExitReason))
@pytest.mark.parametrize("policy", list(RestartPolicy))
def test_policies(policy: RestartPolicy, reason: ExitReason) -> None:
    again = exits.should_restart(vm(policy), end(reason), 1010.0)
    if policy is RestartPolicy.NEVER or reason in MEANT:
        assert not again
    elif policy is RestartPolicy.ON_FAILURE:
        assert again == (reason in FAILURES)
    else:
        assert again


def test_what_speaks_against_it() -> None:
    crash = end(ExitReason.CRASHED)
    assert exits.should_restart(vm(), crash, 1010.0)
    assert not exits.should_restart(vm(tasks=("task-0",)), crash, 1010.0)
    assert not exits.should_restart(vm(power=Power.PAUSED), crash, 1010.0)
    assert not exits.should_restart(vm(power=Power.STOPPED), crash, 1010.0)
    assert not exits.should_restart(vm(restarts=exits.MAX_RESTARTS), crash, 1010.0)


def test_a_steady_run_wipes_the_slate_clean() -> None:
    tired = vm(restarts=exits.MAX_RESTARTS, started=1000.0)
    assert exits.restarts_so_far(tired, 1000.0 + exits.STEADY - 1) == exits.MAX_RESTARTS
    assert exits.restarts_so_far(tired, 1000.0 + exits.STEADY) == 0
    assert exits.should_restart(tired, end(ExitReason.CRASHED), 1000.0 + exits.STEADY)


@given(st.integers(0, 100))
def test_patience_grows_to_a_limit(restarts: int) -> None:
    assert 1.0 <= exits.backoff(restarts) <= exits.backoff(restarts + 1) <= exits.LONGEST_BACKOFF
