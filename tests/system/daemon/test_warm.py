"""``croft run`` that goes on from an earlier boot, and boots where that does not work."""

from __future__ import annotations

import pytest

from tests.system.daemon.installation import Installation, until
from tests.system.daemon.test_clones import OFF, identity
from undercroft.model.template import Template
from undercroft.model.vm import Identity


@pytest.fixture
def warming(empty: Installation, tiny_image_dir: object) -> Installation:
    """An installation that makes warm templates."""
    empty.environ["CROFT_WARM"] = "2"
    empty.add_image(tiny_image_dir)  # type: ignore[arg-type]
    empty.start()
    return empty


def ready(installation: Installation) -> Template:
    """The warm template, once it and nothing else is there."""

    def there() -> Template | None:
        found = installation.client.templates.list()
        busy = [task for task in installation.client.tasks.list() if not task.status.state.final]
        return found[0] if found and found[0].status.memory and not busy else None

    return until(there, "the warm template is there")


def test_the_second_of_a_kind_does_not_boot(warming: Installation) -> None:
    client = warming.client
    warming.run("a1", disk=1 << 30)
    warming.shell("a1", "echo private > /tmp/memory; echo of-a1 | dd of=/dev/vda conv=fsync")
    template = ready(warming)
    assert template.spec.warm
    # Its own boot is over, and nothing of it can be seen.
    assert [vm.meta.name for vm in client.vms.list()] == ["a1"]
    until(lambda: len(warming.processes()) == 1, "only a1 runs")
    for name in ("a2", "a3"):
        if name == "a3":  # one that was made ready meanwhile, as nobody's
            until(lambda: len(warming.processes()) == 4, "two are held ready")
            until(lambda: len(client.vms.list()) == 2, "they are not shown")
        before = set(warming.processes())
        vm = warming.run(name, disk=1 << 30, ready=False)
        assert vm.status.instance is not None
        assert (vm.status.instance.pid in before) is (name == "a3")
        assert vm.status.agent, "it is there at once"
        assert vm.status.identity is Identity.OWN, vm.status.shares
        # What a1's user did is a1's: they go on from a boot that was nobody's.
        assert warming.shell(name, "cat /tmp/memory; head -c5 /dev/vda | tr -d '\\0'") == ""
    a2, a3 = identity(warming, "a2"), identity(warming, "a3")
    assert (a2[0], a3[0]) == ("a2", "a3")
    assert not set(a2) & set(a3)
    assert not set(a2) & set(identity(warming, "a1"))
    # With its new MAC it gets the address to which forwarded ports lead.
    lease = warming.shell("a2", "udhcpc -i eth0 -n -q -s /bin/true 2>&1")
    assert "lease of 10.0.2.15" in lease
    # It survives being switched off and on.
    warming.finish(client.vms.restart("a2", OFF))
    # A template that is broken is given up, and the VM boots.
    warming.kill()
    directory = warming.data / "templates" / template.meta.id
    (directory / "memory" / "devices").write_bytes(b"nonsense")
    warming.start()
    booting = warming.run("a4", disk=1 << 30, ready=False)
    assert booting.status.state == "running"
    assert client.templates.list() == []
    warming.wait_ready("a2")
    assert warming.shell("a2", "hostname") == "a2"
    warming.assert_in_order()
    for name in ("a1", "a2", "a3", "a4"):
        warming.finish(client.vms.remove(name, force=True))
    until(lambda: not list((warming.data / "volumes").iterdir()), "no layer is left")
