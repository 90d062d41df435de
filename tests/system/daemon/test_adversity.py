"""What guests, users and the world do to a running installation."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from tests.system.daemon.installation import Installation, until, wait_gone
from undercroft.model.errors import (
    BusyError,
    ConflictError,
    InvalidError,
    NotFoundError,
    UndercroftError,
    WrongStateError,
)
from undercroft.model.requests import ExecRequest, StopRequest, VMChange, VMCreate
from undercroft.model.task import TaskState
from undercroft.model.vm import RestartPolicy


def test_qemu_killed_is_started_again(installation: Installation) -> None:
    vm = installation.run("web1", ready=False)
    assert vm.status.instance is not None
    os.kill(vm.status.instance.pid, 9)
    wait_gone(vm.status.instance.pid)

    def again() -> bool:
        now = installation.client.vms.get("web1").status
        return now.instance is not None and now.instance.pid != vm.status.instance.pid  # type: ignore[union-attr]

    until(again, "it runs again")
    status = installation.client.vms.get("web1").status
    assert status.last_exit is not None
    assert status.last_exit.reason == "killed"
    assert status.last_exit.signal == 9
    assert status.restarts == 1
    types = [e.type for e in installation.client.events.list()]
    assert "vm.killed" in types
    assert "vm.restarted" in types
    installation.assert_in_order()


def test_qemu_killed_stays_down_if_told_so(installation: Installation) -> None:
    vm = installation.run("web1", ready=False, restart=RestartPolicy.NEVER)
    assert vm.status.instance is not None
    os.kill(vm.status.instance.pid, 9)
    stopped = installation.wait_state("web1", "stopped")
    assert stopped.spec.power == "stopped"
    assert stopped.status.last_exit is not None
    assert stopped.status.last_exit.reason == "killed"
    assert installation.processes() == {}


def test_guest_that_panics(installation: Installation) -> None:
    installation.run("web1", restart=RestartPolicy.NEVER)
    panic = "(sleep 2; echo c > /proc/sysrq-trigger) >/dev/null 2>&1 &"  # after our answer
    installation.shell("web1", f"echo 1 > /proc/sys/kernel/sysrq; {panic}")
    stopped = installation.wait_state("web1", "stopped")
    assert stopped.status.last_exit is not None
    assert stopped.status.last_exit.reason == "guest-panic"


def test_guest_that_shuts_itself_down(installation: Installation) -> None:
    installation.run("web1")
    installation.shell("web1", "(sleep 1; poweroff) >/dev/null 2>&1 &")
    stopped = installation.wait_state("web1", "stopped")
    assert stopped.status.last_exit is not None
    assert stopped.status.last_exit.reason == "guest-shutdown"
    assert stopped.spec.power == "stopped"


def test_guest_that_shuts_down_while_no_daemon_runs(installation: Installation) -> None:
    installation.run("web1")
    installation.in_background("web1", "sleep 2; poweroff")
    installation.kill()
    time.sleep(6)
    installation.start()
    stopped = installation.wait_state("web1", "stopped")
    assert stopped.status.last_exit is not None
    assert stopped.status.last_exit.reason == "guest-shutdown"


def test_guest_that_ignores_shutdown(installation: Installation) -> None:
    installation.run("web1", ready=True)
    installation.shell("web1", "killall acpid; printf '#!/bin/sh\\n' > /sbin/shutdown; true")
    installation.shell("web1", "for p in poweroff halt reboot; do rm -f /sbin/$p; done; true")
    task = installation.client.vms.stop("web1", StopRequest(timeout=3))
    done = installation.finish(task)
    assert done.status.result["reason"] == "forced"
    vm = installation.client.vms.get("web1")
    assert vm.status.last_exit is not None
    assert "did not shut down" in vm.status.last_exit.message
    assert installation.processes() == {}


def test_force_overtakes_a_patient_stop(installation: Installation) -> None:
    installation.run("web1", ready=False)
    patient = installation.client.vms.stop("web1", StopRequest(timeout=600))
    until(
        lambda: installation.client.tasks.get(patient.meta.id).status.state is TaskState.RUNNING,
        "the patient stop is under way",
    )
    forced = installation.client.vms.stop("web1", StopRequest(force=True))
    installation.finish(forced)
    assert installation.client.tasks.get(patient.meta.id).status.state.final
    installation.wait_state("web1", "stopped")
    assert installation.processes() == {}


def test_guest_that_floods_its_console(installation: Installation) -> None:
    installation.run("web1")
    installation.shell("web1", "(while :; do cat /proc/kallsyms; done) > /dev/ttyS0 2>&1 &")
    directory = installation.data / "vms" / installation.client.vms.get("web1").meta.id
    size = 0
    for _ in range(20):
        size = sum(p.stat().st_size for p in directory.glob("console.log*"))
        assert size <= (1 << 20) + (64 << 10)
        # The daemon goes on answering others all the while.
        assert installation.client.vms.get("web1").status.state == "running"
        threading.Event().wait(0.25)
    assert size > 0
    assert len(installation.client.vms.log("web1")) <= 1 << 20
    installation.finish(installation.client.vms.stop("web1", StopRequest(force=True)))


def test_fifty_requests_at_once_on_one_vm(installation: Installation) -> None:
    installation.run("web1", ready=False)
    outcomes: list[str] = []
    lock = threading.Lock()

    def ask(number: int) -> None:
        client = installation.client
        verbs: list[Callable[[], object]] = [
            lambda: client.vms.stop("web1", StopRequest(force=True)),
            lambda: client.vms.start("web1"),
            lambda: client.vms.pause("web1"),
            lambda: client.vms.resume("web1"),
            lambda: client.vms.set("web1", VMChange(labels={"n": str(number)})),
        ]
        try:
            verbs[number % len(verbs)]()
            outcome = "done"
        except (ConflictError, BusyError) as error:
            outcome = error.code
        with lock:
            outcomes.append(outcome)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 50, "every request was answered"
    assert outcomes.count("done") >= 10
    until(lambda: not installation.client.vms.get("web1").tasks, "all tasks are done")
    vm = installation.client.vms.get("web1")
    alive = vm.status.state in ("running", "paused")
    history = [f"{e.type}: {e.message}" for e in installation.client.events.list(limit=200)]
    assert len(installation.processes()) == (1 if alive else 0), (vm, history)
    assert vm.spec.power.value == vm.status.state.value
    installation.assert_in_order()


def test_two_daemons_on_one_directory(installation: Installation) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "undercroft.cli", "daemon", "--data", str(installation.data)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 1
    assert "data-locked" in second.stderr
    assert installation.daemon is not None
    assert str(installation.daemon.pid) in second.stderr
    assert installation.client.version().pid == installation.daemon.pid


NONSENSE = [
    VMCreate(image="tiny", name="../../etc"),
    VMCreate(image="tiny", name="vm-0123456789abcdef"),
    VMCreate(image="tiny", cpus=0),
    VMCreate(image="tiny", cpus=10**6),
    VMCreate(image="tiny", memory=1),
    VMCreate(image="tiny", memory=-(1 << 30)),
    VMCreate(image="tiny", disk=1 << 60),
    VMCreate(image="tiny", disk=7),
    VMCreate(image="tiny", kernel_arguments="a\nb"),
    VMCreate(image="no/such"),
    VMCreate(labels={"": "x"}),
]


def test_nonsense_is_refused(installation: Installation) -> None:
    for nonsense in NONSENSE:
        with pytest.raises((InvalidError, NotFoundError)):
            installation.client.vms.create(nonsense)
    assert installation.client.vms.list() == []


def test_wrong_states_are_told(installation: Installation) -> None:
    client = installation.client
    installation.finish(client.vms.create(VMCreate(name="web1", image="tiny")))
    for verb in (client.vms.pause, client.vms.resume, client.vms.suspend, client.vms.reset):
        with pytest.raises(WrongStateError) as caught:
            verb("web1")
        assert "web1" in caught.value.message
    with pytest.raises(UndercroftError):
        client.vms.exec("web1", ExecRequest(argv=("true",)))
    installation.finish(client.vms.remove("web1"))
