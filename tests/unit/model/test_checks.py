"""Which specs make sense; and that nonsense is refused with an error of ours."""

from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.model.base import Meta
from undercroft.model.checks import MAX_MEMORY, MIN_MEMORY, check_can_be_saved, check_vm_spec
from undercroft.model.errors import InvalidError, UndercroftError, UnsupportedError
from undercroft.model.units import MiB, TiB
from undercroft.model.vm import (
    VM,
    Disk,
    DiskBus,
    Display,
    Firmware,
    Forward,
    Guest,
    Machine,
    NicModel,
    Port,
    VMSpec,
)
from undercroft.model.volume import MAX_VOLUME, check_volume_size

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKx me@here"


def spec(**values: object) -> VMSpec:
    return msgspec.structs.replace(VMSpec(host="host-0000000000000000"), **values)


def port(**values: object) -> tuple[Port, ...]:
    return (msgspec.structs.replace(Port(mac="52:54:00:00:00:01"), **values),)


def forwarded(**values: object) -> tuple[Port, ...]:
    return port(forwards=(msgspec.structs.replace(Forward(guest_port=22), **values),))


MICROVM = {"machine": Machine.MICROVM, "firmware": Firmware.KERNEL, "display": Display.NONE}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"cpus": 255, "memory": MAX_MEMORY},
        {"memory": MIN_MEMORY, "stop_timeout": 0},
        {"cpu_model": "max,-svm,+npt,phys-bits=40"},
        MICROVM,
        {"firmware": Firmware.UEFI, "secure_boot": True, "tpm": True},
        {"arch": "aarch64", "machine": Machine.VIRT, "firmware": Firmware.UEFI},
        {"ports": port(model=NicModel.E1000E)},
        {"ports": forwarded(host_port=65535, host_address="0.0.0.0")},
        {"guest": Guest(hostname="a.b-c.D", user="_me", ssh_keys=(KEY, f"{KEY}\n"))},
        {"guest": Guest(password_hash="$6$saltsalt$abcdefgh", user_data="#cloud-config\né\n")},
    ],
)
def test_what_makes_sense_passes_unchanged(values: dict[str, object]) -> None:
    wanted = spec(**values)
    assert check_vm_spec(wanted) is wanted


@pytest.mark.parametrize(
    "values",
    [
        {"cpus": 0},
        {"cpus": 256},
        {"cpus": -1},
        {"memory": 0},
        {"memory": MIN_MEMORY - MiB},
        {"memory": MIN_MEMORY + 1},
        {"memory": MAX_MEMORY + MiB},
        {"memory": -512 * MiB},
        {"arch": "z80"},
        {"arch": "aarch64"},
        {"machine": Machine.VIRT},
        {"stop_timeout": -1.0},
        {"stop_timeout": float("nan")},
        {"stop_timeout": float("inf")},
        {"cpu_model": ""},
        {"cpu_model": "max\n"},
        {"cpu_model": "max,host;x"},
        {"kernel_arguments": "quiet\nroot=/dev/sda"},
        {"kernel_arguments": "x" * 2049},
        {"kernel_arguments": "é"},
        {"secure_boot": True},
        {"disks": (Disk(volume="vol-0000000000000000"),) * 17},
        {"ports": port() * 9},
        {"ports": port() * 2},
        {"ports": port(mac="52:54:00:00:00")},
        {"ports": port(mac="52:54:00:AA:00:01")},
        {"ports": port(mac="53:54:00:00:00:01")},
        {"ports": forwarded(guest_port=0)},
        {"ports": forwarded(guest_port=65536)},
        {"ports": forwarded(host_port=-1)},
        {"ports": forwarded(host_port=65536)},
        {"ports": forwarded(host_address="localhost")},
        {"ports": forwarded(host_address="127.0.0.1\n")},
        {"ports": forwarded(host_address="::1")},
        {"ports": port(forwards=(Forward(guest_port=1),) * 65)},
        {"ports": port(forwards=(Forward(guest_port=1, host_port=9),) * 2)},
        {"guest": Guest(user="Root")},
        {"guest": Guest(user="")},
        {"guest": Guest(hostname="")},
        {"guest": Guest(hostname="a..b")},
        {"guest": Guest(hostname="-a")},
        {"guest": Guest(ssh_keys=("no key",))},
        {"guest": Guest(ssh_keys=(f"{KEY}\nruncmd: [evil]",))},
        {"guest": Guest(password_hash="secret")},
        {"guest": Guest(user_data="x" * (MiB + 1))},
        {"guest": Guest(user_data="\udc80")},
    ],
)
def test_what_makes_no_sense_is_invalid(values: dict[str, object]) -> None:
    with pytest.raises(InvalidError):
        check_vm_spec(spec(**values))


@pytest.mark.parametrize(
    "values",
    [
        {**MICROVM, "firmware": Firmware.BIOS},
        {**MICROVM, "display": Display.STD},
        {**MICROVM, "ports": port(model=NicModel.E1000E)},
        {**MICROVM, "tpm": True},
        {
            "arch": "aarch64",
            "machine": Machine.VIRT,
            "firmware": Firmware.UEFI,
            "secure_boot": True,
        },
    ],
)
def test_what_cannot_be_had_is_unsupported(values: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_vm_spec(spec(**values))
    assert caught.value.message


ANYTHING = st.text(max_size=40)
FORWARDS = st.builds(
    Forward,
    guest_port=st.integers(-1, 70000),
    host_port=st.integers(-1, 70000),
    host_address=st.sampled_from(["127.0.0.1", "0.0.0.0"]) | ANYTHING,
)
SPECS = st.builds(
    VMSpec,
    host=st.just("host-0000000000000000"),
    cpus=st.integers(-(1 << 64), 1 << 64),
    memory=st.integers(-(1 << 64), 1 << 64) | st.just(512 * MiB),
    arch=st.sampled_from(["x86_64", "aarch64"]) | ANYTHING,
    machine=st.sampled_from(Machine),
    firmware=st.sampled_from(Firmware),
    display=st.sampled_from(Display),
    secure_boot=st.booleans(),
    tpm=st.booleans(),
    cpu_model=st.none() | ANYTHING,
    kernel_arguments=ANYTHING,
    stop_timeout=st.floats(),
    ports=st.lists(
        st.builds(Port, mac=ANYTHING, forwards=st.lists(FORWARDS, max_size=3).map(tuple)),
        max_size=3,
    ).map(tuple),
    guest=st.builds(
        Guest,
        hostname=st.none() | ANYTHING,
        user=st.none() | ANYTHING,
        ssh_keys=st.lists(ANYTHING, max_size=2).map(tuple),
        password_hash=st.none() | ANYTHING,
        user_data=st.none() | ANYTHING | st.just("\ud800"),
    ),
)


@given(SPECS)
def test_nonsense_specs_raise_nothing_but_errors_of_ours(wanted: VMSpec) -> None:
    try:
        checked = check_vm_spec(wanted)
    except UndercroftError:
        return
    assert checked is wanted


@pytest.mark.parametrize("size", [512, MiB, 10 << 30, MAX_VOLUME])
def test_good_volume_sizes(size: int) -> None:
    assert check_volume_size(size) == size


@pytest.mark.parametrize("size", [0, -512, 511, MiB + 1, MAX_VOLUME + 512, 1 << 60, 65 * TiB])
def test_bad_volume_sizes(size: int) -> None:
    with pytest.raises(InvalidError):
        check_volume_size(size)


def test_what_to_do_instead_is_what_was_asked_for_without_the_memory():
    disks = (Disk(volume="vol-0000000000000000", bus=DiskBus.NVME),)
    vm = VM(meta=Meta(id="vm-0000000000000000", name="web1", created=1.0), spec=spec(disks=disks))
    expected: dict[Literal["suspend", "snapshot", "template", "clone"], str] = {
        "suspend": "shut it down: croft stop web1",
        "snapshot": "take the snapshot without --memory",
        "template": "make the template without --memory",
        "clone": "croft clone web1 NAME --linked",
    }
    for what, otherwise in expected.items():
        with pytest.raises(UnsupportedError) as refused:
            check_can_be_saved(vm, what)
        action = refused.value.action
        assert action == f"{otherwise}, or give it disks with bus virtio or scsi"
        check_can_be_saved(msgspec.structs.replace(vm, spec=spec()), what)
