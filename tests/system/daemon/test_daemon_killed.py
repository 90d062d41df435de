"""The daemon killed with -9 in the middle of things: nothing is lost, nothing is left over."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from tests.system.daemon.installation import Installation, until
from undercroft.model.errors import UndercroftError
from undercroft.model.image import ImageSourceKind
from undercroft.model.requests import ImageCreate, StopRequest, VMCreate
from undercroft.model.task import TaskState
from undercroft.model.vm import Port, PortMode

RESTRICTED = (Port(mode=PortMode.RESTRICTED),)


def test_running_vm_is_taken_over(installation: Installation) -> None:
    vm = installation.run("web1")
    instance = vm.status.instance
    assert instance is not None
    installation.shell("web1", "echo kept > /tmp/mark")
    installation.kill()
    assert instance.pid in installation.processes()
    installation.start()
    again = installation.client.vms.get("web1")
    assert again.status.instance == instance
    assert again.status.state == "running"
    assert installation.shell("web1", "cat /tmp/mark") == "kept"
    installation.assert_in_order()
    installation.finish(installation.client.vms.stop("web1", StopRequest(timeout=60)))
    assert installation.processes() == {}


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_killed_while_creating(installation: Installation, delay: float) -> None:
    client = installation.client
    request = VMCreate(image="tiny", disk=1 << 30, start=True, ports=RESTRICTED)
    tasks = [client.vms.create(request) for _ in range(2)]
    time.sleep(delay)
    installation.kill()
    installation.start()
    for task in tasks:
        installation.finish(task)
        vm = installation.wait_state(task.spec.object.name, "running")
        assert vm.status.instance is not None
    pids = set(installation.processes())
    assert len(pids) == 2, "each VM has exactly one process"
    installation.assert_in_order()
    for task in tasks:
        installation.finish(installation.client.vms.remove(task.spec.object.name, force=True))
    assert installation.processes() == {}
    assert list((installation.data / "volumes").iterdir()) == []
    assert list((installation.data / "vms").iterdir()) == []
    installation.assert_in_order()


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
def test_killed_while_stopping(installation: Installation, delay: float) -> None:
    installation.run("web1")
    task = installation.client.vms.stop("web1", StopRequest(timeout=60))
    time.sleep(delay)
    installation.kill()
    installation.start()
    installation.finish(task)
    vm = installation.wait_state("web1", "stopped")
    assert vm.status.instance is None
    assert installation.processes() == {}
    installation.assert_in_order()


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.25])
def test_killed_while_suspending(installation: Installation, delay: float) -> None:
    installation.run("web1")
    installation.shell("web1", "echo kept > /tmp/mark")
    task = installation.client.vms.suspend("web1")
    time.sleep(delay)
    installation.kill()
    installation.start()
    installation.finish(task)
    installation.wait_state("web1", "suspended")
    assert installation.processes() == {}
    installation.finish(installation.client.vms.start("web1"))
    assert installation.shell("web1", "cat /tmp/mark") == "kept"
    installation.assert_in_order()


def test_killed_while_building_an_image(empty: Installation) -> None:
    empty.start()
    request = ImageCreate(source=ImageSourceKind.BUILD, value="tiny")
    task = empty.client.images.create(request)
    until(lambda: empty.client.tasks.get(task.meta.id).status.progress, "the build is under way")
    empty.kill()
    empty.start()
    assert not empty.client.tasks.get(task.meta.id).status.state.final
    empty.client.tasks.cancel(task.meta.id)
    empty.finish(task, TaskState.CANCELLED)
    assert empty.client.images.list() == []
    until(lambda: not list((empty.data / "tmp").iterdir()), "nothing half-made is left")
    assert list((empty.data / "images").iterdir()) == []
    empty.assert_in_order()


def test_qemu_started_but_not_yet_recorded(installation: Installation) -> None:
    """The gap between the start of QEMU and the record of it: the same VM never runs twice."""
    client = installation.client
    task = client.vms.create(VMCreate(name="web1", image="tiny", start=True, ports=RESTRICTED))
    with contextlib.suppress(UndercroftError):
        until(installation.processes, "QEMU runs")
    installation.kill()
    before = set(installation.processes())
    installation.start()
    installation.finish(task)
    vm = installation.wait_state("web1", "running")
    assert vm.status.instance is not None
    assert list(installation.processes()) == [vm.status.instance.pid]
    assert before  # else the gap was not hit
    installation.assert_in_order()


def test_reused_pid_is_no_vm(installation: Installation) -> None:
    """A record whose process is gone, while another has its pid: the other is left alone."""
    vm = installation.run("web1", ready=False)
    instance = vm.status.instance
    assert instance is not None
    installation.kill()
    os.kill(instance.pid, 9)
    until(lambda: not installation.processes(), "QEMU is gone")
    installation.start()
    # Killed from outside counts as a failure, so the VM is running again, as another process.
    again = installation.wait_state("web1", "running")
    assert again.status.instance is not None
    assert again.status.instance.pid != instance.pid
    assert again.status.last_exit is not None
    installation.assert_in_order()
