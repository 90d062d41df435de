"""Clones of real guests: what they begin with, that they are somebody else, and that neither a
crash nor their source's later life does them any harm."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.system.daemon.installation import Installation, until, wait_gone
from tests.system.daemon.test_snapshots import read, write
from undercroft.model.errors import AlreadyExistsError, NotFoundError, WrongStateError
from undercroft.model.requests import (
    CloneMode,
    CloneRequest,
    SnapshotCreate,
    StopRequest,
    TemplateCreate,
)
from undercroft.model.task import TaskState
from undercroft.model.vm import Identity

OFF = StopRequest(force=True)
IDENTITY = (
    "hostname; cat /proc/sys/kernel/random/boot_id; cat /sys/class/net/eth0/address; "
    "head -c 16 /dev/urandom | md5sum"
)


def clone(installation: Installation, source: str, *names: str, **values: object) -> None:
    request = CloneRequest(names=names, **values)  # type: ignore[arg-type]
    for task in installation.client.vms.clone(source, request):
        installation.finish(task)


def identity(installation: Installation, name: str) -> list[str]:
    return installation.shell(name, IDENTITY).splitlines()


def layer_files(installation: Installation) -> set[str]:
    return {path.name for path in (installation.data / "volumes").iterdir()}


def test_linked_clones_of_a_vm_that_is_off(installation: Installation) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    write(installation, "web1", "base")
    installation.finish(client.vms.stop("web1", OFF))
    clone(installation, "web1", "web2", "web3")
    for name in ("web2", "web3"):
        vm = client.vms.get(name)
        assert (vm.status.state, vm.status.identity) == ("stopped", Identity.PENDING)
    for name in ("web1", "web2", "web3"):
        installation.finish(client.vms.start(name))
    for name in ("web1", "web2", "web3"):
        installation.wait_ready(name)
        assert read(installation, name) == "base"
        write(installation, name, f"of {name}")
        assert installation.shell(name, "hostname") == name
    assert read(installation, "web2") == "of web2"
    until(lambda: client.vms.get("web2").status.identity is Identity.OWN, "web2 is somebody")
    # What the clones lie on stays, whatever becomes of the source.
    installation.finish(client.vms.remove("web1", force=True))
    assert read(installation, "web3") == "of web3"
    installation.finish(client.vms.restart("web3", OFF))
    installation.wait_ready("web3")
    assert read(installation, "web3") == "of web3"
    installation.assert_in_order()
    for name in ("web2", "web3"):
        installation.finish(client.vms.remove(name, force=True))
    assert layer_files(installation) == set()
    assert client.templates.list() == []
    installation.assert_in_order()


def test_a_full_clone_shares_nothing(installation: Installation) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    write(installation, "web1", "base")
    installation.finish(client.snapshots.create("web1", SnapshotCreate(name="one")))
    installation.shell("web1", "printf more | dd of=/dev/vda bs=1M seek=5 conv=notrunc,fsync")
    clone(installation, "web1", "web2", mode=CloneMode.FULL, start=True)
    write(installation, "web1", "changed")
    installation.wait_ready("web2")
    assert read(installation, "web2") == "base"
    assert installation.shell("web2", "dd if=/dev/vda bs=1M skip=5 count=1 | head -c4") == "more"
    before = layer_files(installation)
    installation.finish(client.vms.remove("web1", force=True))
    assert len(layer_files(installation)) == 1 < len(before)
    write(installation, "web2", "alone")
    assert read(installation, "web2") == "alone"
    installation.assert_in_order()


def test_instant_clones_of_a_running_vm(installation: Installation) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    write(installation, "web1", "base")
    installation.shell("web1", "echo kept > /tmp/memory")
    known = until(lambda: client.vms.get("web1").status.addresses, "web1 has an address")
    clone(installation, "web1", "a", "b", mode=CloneMode.INSTANT)
    # The source goes on, and what it does reaches nobody.
    installation.shell("web1", "echo changed > /tmp/memory")
    write(installation, "web1", "changed")
    for name in ("a", "b"):
        vm = client.vms.get(name)
        assert vm.status.state == "running"
        assert (vm.status.agent, vm.status.addresses) == (True, known)  # from the beginning
        assert installation.shell(name, "cat /tmp/memory") == "kept"
        assert read(installation, name) == "base"
        assert "MAC address" not in vm.status.shares
        assert vm.spec.ports[0].mac == identity(installation, name)[2]
        write(installation, name, f"of {name}")
        installation.shell(name, f"echo {name} > /tmp/memory")
    assert installation.shell("web1", "cat /tmp/memory") == "changed"
    own = [identity(installation, name) for name in ("web1", "a", "b")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        equal = [x for x, y in zip(own[first], own[second], strict=True) if x == y]
        assert equal == [], equal

    # A clone is like any other VM: it can be cloned, suspended, snapshotted, rebooted.
    clone(installation, "a", "c", mode=CloneMode.INSTANT)
    assert installation.shell("c", "cat /tmp/memory") == "a"
    assert client.vms.get("c").status.shares == client.vms.get("a").status.shares == ()
    theirs, anew = identity(installation, "a"), identity(installation, "c")
    assert theirs[:3] == own[1][:3]  # what is left is random
    assert [x for x, y in zip(theirs, anew, strict=True) if x == y] == []
    assert read(installation, "c") == "of a"
    installation.finish(client.vms.remove("web1", force=True))
    installation.finish(client.vms.suspend("a"))
    installation.finish(client.vms.resume("a"))
    installation.wait_ready("a")
    assert installation.shell("a", "cat /tmp/memory; hostname").split() == ["a", "a"]
    installation.finish(client.vms.restart("b", OFF))
    installation.wait_ready("b")
    assert read(installation, "b") == "of b"
    assert installation.shell("b", "hostname; [ -e /tmp/memory ] || echo fresh").split() == [
        "b",
        "fresh",
    ]
    installation.assert_in_order()


def test_a_template_outlives_its_source_and_the_daemon(installation: Installation) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    write(installation, "web1", "base")
    installation.shell("web1", "echo warm > /tmp/memory")
    request = TemplateCreate(name="tiny:warm", source="web1", memory=True)
    installation.finish(client.templates.create(request))
    with pytest.raises(AlreadyExistsError):
        client.templates.create(request)
    installation.finish(client.vms.remove("web1", force=True))
    installation.kill()
    installation.start()
    template = client.templates.get("tiny:warm")
    assert template.status.memory > 0
    for task in client.templates.clone("tiny:warm", CloneRequest(count=3)):
        installation.finish(task)
    for name in ("tiny-warm-1", "tiny-warm-2", "tiny-warm-3"):
        assert installation.shell(name, "cat /tmp/memory; hostname").split() == ["warm", name]
        assert read(installation, name) == "base"
    for task in client.templates.clone(
        "tiny:warm", CloneRequest(names=("cold",), mode=CloneMode.LINKED, start=True)
    ):
        installation.finish(task)
    installation.wait_ready("cold")
    assert installation.shell("cold", "[ -e /tmp/memory ] || echo fresh") == "fresh"
    client.templates.remove("tiny:warm")
    with pytest.raises(NotFoundError):
        client.templates.get("tiny:warm")
    assert read(installation, "tiny-warm-2") == "base"
    until(lambda: not list((installation.data / "templates").iterdir()), "its files are gone")
    installation.assert_in_order()


def test_what_is_refused(installation: Installation) -> None:
    client = installation.client
    installation.run("web1", ready=False)
    installation.finish(client.vms.stop("web1", OFF))
    with pytest.raises(WrongStateError, match="instant"):
        client.vms.clone("web1", CloneRequest(names=("x",), mode=CloneMode.INSTANT))
    with pytest.raises(WrongStateError, match="memory"):
        client.templates.create(TemplateCreate(name="t", source="web1", memory=True))
    with pytest.raises(AlreadyExistsError):
        client.vms.clone("web1", CloneRequest(names=("web2", "web1")))
    with pytest.raises(NotFoundError):
        client.vms.get("web2")
    assert client.templates.list() == []
    installation.assert_in_order()


# Linked ones have to boot; what can be killed of them is in tests/system/host/test_accidents.py.
@pytest.mark.parametrize(
    ("mode", "delay"),
    [(CloneMode.LINKED, 0.1), *((CloneMode.INSTANT, delay) for delay in (0.02, 0.1, 0.25, 0.5))],
)
def test_daemon_killed_while_cloning(
    installation: Installation, mode: CloneMode, delay: float
) -> None:
    client = installation.client
    installation.run("web1", disk=1 << 30)
    write(installation, "web1", "base")
    tasks = client.vms.clone("web1", CloneRequest(names=("a", "b"), mode=mode, start=True))
    time.sleep(delay)
    installation.kill()
    installation.start()
    for task in tasks:
        installation.finish(task)
    for name in ("web1", "a", "b"):
        installation.wait_ready(name)
        assert read(installation, name) == "base"
        write(installation, name, name)
    for name in ("web1", "a", "b"):
        assert read(installation, name) == name
    until(lambda: not list((installation.data / "templates").iterdir()), "nothing passing is left")
    installation.assert_in_order()


def test_source_killed_while_cloning(installation: Installation) -> None:
    client = installation.client
    vm = installation.run("web1", disk=1 << 30)
    write(installation, "web1", "base")
    tasks = client.vms.clone("web1", CloneRequest(names=("a",), mode=CloneMode.INSTANT))
    assert vm.status.instance is not None
    os.kill(vm.status.instance.pid, signal.SIGKILL)
    wait_gone(vm.status.instance.pid)
    until(lambda: client.tasks.get(tasks[0].meta.id).status.state.final, "it is over")
    task = client.tasks.get(tasks[0].meta.id)
    if task.status.state is TaskState.SUCCEEDED:
        assert read(installation, "a") == "base"
    else:
        with pytest.raises(NotFoundError):
            client.vms.get("a")
    installation.wait_ready("web1")
    assert read(installation, "web1") == "base"
    until(lambda: not list((installation.data / "templates").iterdir()), "nothing passing is left")
    installation.assert_in_order()
