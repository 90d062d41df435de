"""Golden command lines, and the properties that all of them share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.hypervisor.plans import (
    OVMF,
    OVMF_SECURE,
    emulator,
    from_disk,
    overlay,
    plan,
)
from undercroft.hypervisor.commandline import CommandLine, command_line, needs_tsc
from undercroft.hypervisor.devices.base import HOT_PORTS
from undercroft.hypervisor.firmware import FirmwareFiles
from undercroft.hypervisor.line import HandleKind
from undercroft.hypervisor.plan import (
    DiskFormat,
    DiskLayer,
    MachinePlan,
    PlanCdrom,
    PlanDisk,
    PlanForward,
    PlanPort,
)
from undercroft.model.errors import InvalidError, UndercroftError, UnsupportedError
from undercroft.model.vm import (
    DiskBus,
    Display,
    Firmware,
    Machine,
    NicModel,
    PortMode,
    Protocol,
)

DATA = Path(__file__).parent / "data"

PORT = PlanPort(
    mac="52:54:00:12:34:56",
    hostname="web1",
    forwards=(PlanForward(guest_port=22, host_port=40022),),
)


def many_disks() -> MachinePlan:
    """All buses at once, and more virtio disks than there are slots."""
    buses = [DiskBus.SCSI, DiskBus.SCSI, DiskBus.NVME, *[DiskBus.VIRTIO] * 11]
    disks = tuple(overlay(number, bus=bus) for number, bus in enumerate(buses))
    raw = PlanDisk(path="/data/volumes/raw.img", format=DiskFormat.RAW, read_only=True)
    return from_disk(disks=(*disks, raw))


GOLDEN: dict[str, tuple[MachinePlan, FirmwareFiles | None]] = {
    "tiny-q35": (plan(ports=(PORT,)), None),
    "tiny-microvm": (plan(machine=Machine.MICROVM, ports=(PORT,), agent=True), None),
    "tiny-kvm": (plan(accelerator="kvm", cpus=4, machine_version="9.2"), None),
    "debian-bios": (from_disk(ports=(PORT,), display=Display.STD), None),
    "debian-uefi": (from_disk(firmware=Firmware.UEFI, ports=(PORT,)), OVMF),
    "debian-secure-boot": (
        from_disk(
            firmware=Firmware.UEFI, secure_boot=True, tpm=True, display=Display.VIRTIO, uid=990
        ),
        OVMF_SECURE,
    ),
    "debian-aarch64": (
        plan(arch="aarch64", machine=Machine.VIRT, ports=(PORT,), disks=(overlay(),)),
        None,
    ),
    "many-disks": (many_disks(), None),
    "windows-like": (
        from_disk(
            disks=(overlay(bus=DiskBus.SATA, boot_index=0),),
            ports=(
                PlanPort(
                    mac="52:54:00:12:34:57",
                    mode=PortMode.RESTRICTED,
                    model=NicModel.E1000E,
                    forwards=(
                        PlanForward(guest_port=3389, host_port=43389, host_address="::1"),
                        PlanForward(guest_port=53, host_port=40053, protocol=Protocol.UDP),
                    ),
                ),
            ),
            display=Display.STD,
            rng=False,
            agent=False,
        ),
        None,
    ),
    "installer": (
        from_disk(
            disks=(overlay(unit=0, boot_index=0),),
            cdroms=(
                PlanCdrom(unit=0, path="/isos/a, b.iso", node="cd0-x1", boot_index=16),
                PlanCdrom(unit=1, boot_index=17),
                PlanCdrom(unit=3, bus=DiskBus.SCSI, path="/isos/c.iso", boot_index=18),
            ),
            seed=None,
            hot_ports=HOT_PORTS,
        ),
        None,
    ),
    "cdrom-microvm": (
        plan(machine=Machine.MICROVM, cdroms=(PlanCdrom(unit=0, bus=DiskBus.SCSI),)),
        None,
    ),
    "bare": (
        plan(rng=False, balloon=False, pvpanic=False, agent=False, initrd=None, vmgenid=None),
        None,
    ),
    "incoming": (plan(incoming="/data/vms/x/suspend.state", machine_version="10.0"), None),
}


def built(name: str) -> CommandLine:
    wanted, firmware = GOLDEN[name]
    tsc = 2_000_000 if needs_tsc(wanted) else None
    return command_line(wanted, emulator(wanted.arch), firmware, tsc_khz=tsc)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    text = "\n".join(built(name).argv) + "\n"
    path = DATA / f"{name}.args"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in DATA.glob("*.args")} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_qemu_opens_no_file_of_ours_by_path(name: str) -> None:
    line = built(name)
    wanted = GOLDEN[name][0]
    secrets = [wanted.directory, wanted.run_directory, "/data/", "/isos/"]
    assert not [text for text in line.argv if any(secret in text for secret in secrets)]


@pytest.mark.parametrize("name", GOLDEN)
def test_always_confined_and_without_default_devices(name: str) -> None:
    argv = built(name).argv
    assert "-nodefaults" in argv
    assert "-no-user-config" in argv
    sandbox = argv[argv.index("-sandbox") + 1]
    assert "spawn=deny" in sandbox
    assert "elevateprivileges=deny" in sandbox


def nodes(line: CommandLine) -> list[dict[str, Any]]:
    pairs = zip(line.argv, line.argv[1:], strict=False)
    return [json.loads(value) for flag, value in pairs if flag == "-blockdev"]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_qcow2_node_states_its_backing(name: str) -> None:
    for node in nodes(built(name)):
        assert node["driver"] in ("file", "raw", "qcow2")
        assert ("backing" in node) == (node["driver"] == "qcow2")


def test_format_given_as_plain_text_still_states_its_backing() -> None:
    disk = PlanDisk(path="/data/a", format="qcow2")  # type: ignore[arg-type]
    tops = [n for n in nodes(command_line(from_disk(disks=(disk,)), emulator())) if "file" in n]
    assert [node["backing"] for node in tops if node["driver"] == "qcow2"] == [None]


def test_unknown_format_is_refused() -> None:
    disk = PlanDisk(path="/data/a", format="vmdk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vmdk"):
        command_line(from_disk(disks=(disk,)), emulator())


def test_chain_is_built_from_the_bottom() -> None:
    chain = tuple(DiskLayer(path=f"/data/{n}", format=DiskFormat.QCOW2) for n in "abc")
    disk = PlanDisk(path="/data/top", format=DiskFormat.QCOW2, backing=chain)
    found = nodes(command_line(from_disk(disks=(disk,), seed=None), emulator()))
    backing = {node["node-name"]: node["backing"] for node in found if "backing" in node}
    assert backing == {
        "disk0": "disk0-base1",
        "disk0-base1": "disk0-base2",
        "disk0-base2": "disk0-base3",
        "disk0-base3": None,
    }
    assert [n["read-only"] for n in found if n["node-name"].startswith("disk0-base")] == [True] * 6


def test_shared_image_is_handed_over_once() -> None:
    line = command_line(from_disk(disks=(overlay(1), overlay(2))), emulator())
    assert [h.path for h in line.handles].count("/data/images/abc/disk.qcow2") == 1


def test_writable_disk_comes_with_both_access_modes_and_read_only_with_one() -> None:
    disk = PlanDisk(path="/data/a", format=DiskFormat.RAW)
    fixed = PlanDisk(path="/data/b", format=DiskFormat.RAW, read_only=True)
    line = command_line(from_disk(disks=(disk, fixed), seed=None), emulator())
    kinds = [(h.path, h.kind) for h in line.handles if h.path.startswith("/data/a")]
    assert kinds == [("/data/a", HandleKind.READ), ("/data/a", HandleKind.WRITE)]
    assert [h.kind for h in line.handles if h.path == "/data/b"] == [HandleKind.READ]


def test_descriptors_are_put_in() -> None:
    line = built("debian-bios")
    numbers = {handle.name: 100 + n for n, handle in enumerate(line.handles)}
    argv = line.with_descriptors(numbers)
    assert f"socket,id=qmp,fd={numbers['qmp']},server=on,wait=off" in argv
    assert not [text for text in argv if "@" in text]


def test_text_of_the_user_is_never_taken_for_a_descriptor() -> None:
    line = command_line(plan(name="@qmp@", kernel_arguments="a=@qmp@ b=@serial@"), emulator())
    argv = line.with_descriptors({handle.name: 77 for handle in line.handles})
    assert "a=@qmp@ b=@serial@" in argv
    assert [text for text in argv if text.startswith("guest=@qmp@,")]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), min_size=1))
def test_commas_in_names_add_no_options(name: str) -> None:
    argv = command_line(plan(name=name), emulator()).argv
    value = argv[argv.index("-name") + 1]
    # As QEMU splits it: a doubled comma is a comma of the value.
    parts = value.replace(",,", "\0").split(",")
    assert [part.split("=")[0] for part in parts[1:]] == ["process", "debug-threads"]
    assert parts[0].replace("\0", ",") == f"guest={name}"


def places(line: CommandLine) -> dict[str, str]:
    """Bus address by device id."""
    found = {}
    for flag, value in zip(line.argv, line.argv[1:], strict=False):
        if flag == "-device" and "bus=pcie.0" in value:
            fields = dict(part.split("=", 1) for part in value.split(",")[1:])
            found[fields["id"]] = fields["addr"]
    return found


@settings(deadline=None, max_examples=40)
@given(
    ports=st.integers(0, 48),
    disks=st.lists(st.sampled_from([DiskBus.VIRTIO, DiskBus.NVME, DiskBus.SCSI]), max_size=96),
    display=st.sampled_from(Display),
    rng=st.booleans(),
    balloon=st.booleans(),
)
def test_bus_addresses_are_unique_and_do_not_move(
    ports: int, disks: list[DiskBus], display: Display, rng: bool, balloon: bool
) -> None:
    wanted = from_disk(
        ports=tuple(PlanPort(mac=f"52:54:00:00:00:{n:02x}") for n in range(ports)),
        disks=tuple(
            PlanDisk(path=f"/d{n}", format=DiskFormat.RAW, bus=bus) for n, bus in enumerate(disks)
        ),
        display=display,
        rng=rng,
        balloon=balloon,
    )
    found = places(command_line(wanted, emulator()))
    assert len(set(found.values())) == len(found)
    firsts = {place.split(".")[0] for place in found.values() if place.endswith(".0")}
    assert {place.split(".")[0] for place in found.values()} == firsts  # else guests see nothing
    everything = msgspec.structs.replace(wanted, display=Display.STD, rng=True, balloon=True)
    more = places(command_line(everything, emulator()))
    assert {name: more[name] for name in found} == found


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": Machine.VIRT},
        {"machine": Machine.Q35, "arch": "aarch64"},
        {"kernel": None},
        {"firmware": Firmware.BIOS},
        {"secure_boot": True},
        {"name": "a\nb"},
        {"kernel_arguments": "a\0b"},
        {"disks": tuple(overlay(n) for n in range(97))},
        {"disks": tuple(overlay(n, bus=DiskBus.SATA) for n in range(7))},
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidError):
        command_line(plan(**changes), emulator())


@pytest.mark.parametrize(
    "changes",
    [
        {"display": Display.STD},
        {"tpm": True},
        {"disks": (overlay(bus=DiskBus.SATA),)},
        {"ports": (PlanPort(mac="52:54:00:12:34:56", model=NicModel.E1000E),)},
        {"firmware": Firmware.BIOS, "kernel": None},
    ],
)
def test_microvm_says_what_it_lacks(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        command_line(plan(machine=Machine.MICROVM, **changes), emulator())


def test_firmware_files_are_needed_for_uefi() -> None:
    with pytest.raises(UndercroftError):
        command_line(from_disk(firmware=Firmware.UEFI), emulator())


def test_user_knows_better_what_the_counter_does() -> None:
    wanted = plan(machine=Machine.MICROVM, kernel_arguments="quiet tsc_early_khz=5")
    argv = command_line(wanted, emulator(), tsc_khz=7).argv
    assert argv[argv.index("-append") + 1] == "quiet tsc_early_khz=5"


def test_board_version_is_pinned_or_that_of_qemu() -> None:
    def machine(wanted: MachinePlan, version: tuple[int, int, int]) -> str:
        argv = command_line(wanted, emulator(version=version)).argv
        return argv[argv.index("-machine") + 1].split(",")[0]

    assert machine(plan(), (10, 0, 2)) == "pc-q35-10.0"
    assert machine(plan(), (7, 2, 17)) == "pc-q35-7.2"
    assert machine(plan(machine_version="8.1"), (10, 0, 2)) == "pc-q35-8.1"
    assert machine(plan(machine=Machine.MICROVM), (10, 0, 2)) == "microvm"
