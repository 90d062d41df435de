"""The peers run the same machine: the domain for libvirt is made from our command line."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from bench.byhand import same_line
from bench.libvirt import domain_xml
from undercroft.hypervisor.commandline import CommandLine, command_line
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.plan import MachinePlan, PlanPort
from undercroft.model.vm import Display, Firmware, PortMode

EMULATOR = Emulator(arch="x86_64", path="/usr/bin/qemu-system-x86_64", version=(10, 0, 2))
PLAN = MachinePlan(
    id="vm-1",
    name="a&b",
    uuid="00000000-0000-0000-0000-000000000001",
    directory="/d",
    run_directory="/r",
    machine_version="10.0",
    firmware=Firmware.KERNEL,
    kernel="/images/kernel",
    initrd="/images/initrd",
    kernel_arguments="quiet undercroft.hostname=x",
    display=Display.STD,
    vmgenid="3948039d-df1e-59ce-8ad3-20d612dcd64d",
    ports=(PlanPort(mac="52:54:00:00:00:01", mode=PortMode.RESTRICTED),),
)


@pytest.fixture
def line() -> CommandLine:
    return command_line(PLAN, EMULATOR)


def test_the_domain_has_our_devices_at_their_places(line):
    domain = ET.fromstring(domain_xml(PLAN, line, "a&b", Path("/s")))

    places = {}
    for argument in line.argv:
        driver, _, rest = argument.partition(",")
        if "addr=0x" in rest:
            slot, _, function = rest.partition("addr=0x")[2].partition(",")[0].partition(".")
            places[driver] = (int(slot, 16), int(function, 16))
    for path, driver in (
        ("devices/rng", "virtio-rng-pci"),
        ("devices/memballoon", "virtio-balloon-pci"),
        ("devices/controller[@type='virtio-serial']", "virtio-serial-pci"),
        ("devices/controller[@type='usb']", "qemu-xhci"),
        ("devices/video", "VGA"),
    ):
        address = domain.find(f"{path}/address")
        assert address is not None
        place = (int(address.get("slot", ""), 16), int(address.get("function", ""), 16))
        assert place == places.pop(driver)
    assert set(places) == {"virtio-net-pci"}  # handed on as it is


def test_a_machine_without_a_screen_is_one_there_too():
    plan = msgspec.structs.replace(PLAN, display=Display.NONE)
    domain = ET.fromstring(domain_xml(plan, command_line(plan, EMULATOR), "web1", Path("/s")))

    assert [video.get("type") for video in domain.iterfind("devices/video/model")] == ["none"]
    assert domain.find("devices/input") is None


def test_the_domain_boots_the_same_and_has_no_way_out(line):
    domain = ET.fromstring(domain_xml(PLAN, line, "a&b", Path("/s")))

    assert domain.findtext("name") == "a&b"
    assert domain.findtext("os/kernel") == PLAN.kernel
    assert domain.findtext("os/cmdline") == PLAN.kernel_arguments
    passed = [
        argument.get("value", "")
        for argument in domain.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")
    ]
    assert passed[0] == "-netdev"
    assert "restrict=on" in passed[1]
    assert passed[2:] == ["-device", next(a for a in line.argv if a.startswith("virtio-net"))]


def test_a_running_line_is_recognised_whatever_its_descriptors_are(line):
    numbers = {handle.name: 20 + index for index, handle in enumerate(line.handles)}

    assert same_line(line, line.with_descriptors(numbers))


def test_a_line_that_differs_is_not_taken_for_the_same(line):
    numbers = {handle.name: 20 + index for index, handle in enumerate(line.handles)}
    running = line.with_descriptors(numbers)

    assert not same_line(line, running[:-1])
    assert not same_line(line, [*running[:-1], "other"])
    other = command_line(msgspec.structs.replace(PLAN, memory=512 << 20), EMULATOR)
    assert not same_line(other, running)
