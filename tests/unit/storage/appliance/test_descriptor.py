"""What we write of a VM, we read again; and VMware's and VirtualBox's parts stand on their own."""

from __future__ import annotations

import hashlib
import re
from xml.etree import ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from undercroft.model.appliance import AppliancePort
from undercroft.model.units import MiB
from undercroft.model.vm import DiskBus, Firmware, NicModel, PortMode
from undercroft.storage.appliance.descriptor import OutDisk, OutMachine, OutPort, write_descriptor
from undercroft.storage.appliance.manifest import read_manifest, write_manifest
from undercroft.storage.appliance.ovf import read_descriptor

disks = st.lists(
    st.builds(
        OutDisk,
        file=st.integers(0, 10**6).map(lambda n: f"d{n}.vmdk"),
        file_size=st.integers(1, 1 << 40),
        size=st.integers(1, 1 << 30).map(lambda n: n * 512),
        bus=st.sampled_from(DiskBus),
    ),
    max_size=16,
    unique_by=lambda disk: disk.file,
)
ports = st.lists(
    st.builds(
        OutPort,
        mode=st.sampled_from(PortMode),
        model=st.sampled_from(NicModel),
        mac=st.just("52:54:00:00:00:01"),
    ),
    max_size=8,
)
machines = st.builds(
    OutMachine,
    name=st.sampled_from(["web1", "db-2.example"]),
    id=st.just("web1"),
    cpus=st.integers(1, 255),
    memory=st.integers(16, 1 << 24).map(lambda n: n * MiB),
    arch=st.sampled_from(["x86_64", "aarch64"]),
    firmware=st.sampled_from(Firmware),
    secure_boot=st.just(False),
    tpm=st.booleans(),
    disks=disks,
    cdroms=st.lists(st.sampled_from([DiskBus.SATA, DiskBus.SCSI]), max_size=4),
    ports=ports,
    nvram=st.none() | st.just(("web1.nvram", 540672)),
    image=st.none() | st.just("ab" * 32),
)


@given(machines)
def test_what_is_written_is_read_again(machine: OutMachine) -> None:
    found = read_descriptor(write_descriptor(machine))
    assert (found.name, found.hardware.cpus, found.hardware.memory) == (
        machine.name,
        machine.cpus,
        machine.memory,
    )
    assert (found.firmware, found.arch, found.image) == (
        machine.firmware,
        machine.arch,
        machine.image,
    )
    assert found.hardware.tpm == machine.tpm
    assert [(d.size, d.bus, d.file.name, d.file.size) for d in found.disks if d.file] == [
        (disk.size, disk.bus, disk.file, disk.file_size) for disk in machine.disks
    ]
    assert found.hardware.ports == [
        AppliancePort(network=str(port.mode), model=port.model) for port in machine.ports
    ]
    assert found.hardware.cdroms == machine.cdroms
    assert found.nvram == (machine.nvram[0] if machine.nvram else None)
    assert [note for note in found.notes if "TPM" not in note] == []


@given(machines)
def test_others_find_every_disk_in_its_place(machine: OutMachine) -> None:
    """Without our own section: no two disks at one place, each controller there, ids once."""
    text = re.sub(
        rb"<undercroft:MachineSection.*</undercroft:MachineSection>", b"",
        write_descriptor(machine), flags=re.DOTALL,
    )  # fmt: skip
    found = read_descriptor(text)
    assert [disk.size for disk in sorted(found.disks, key=lambda d: str(d.file))] == [
        disk.size for disk in sorted(machine.disks, key=lambda d: _key(d))
    ]
    rasd = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"
    places: set[tuple[str | None, str | None]] = set()
    ids: set[str | None] = set()
    for item in ET.fromstring(text).iter():
        if item.tag.endswith("}Item"):
            assert item.findtext(f"{rasd}InstanceID") not in ids
            ids.add(item.findtext(f"{rasd}InstanceID"))
        if item.findtext(f"{rasd}ResourceType") in ("15", "17"):
            place = (item.findtext(f"{rasd}Parent"), item.findtext(f"{rasd}AddressOnParent"))
            assert place not in places
            assert place != ("4", "7")  # VMware's SCSI controller itself
            places.add(place)
            assert place[0] in ids


def _key(disk: OutDisk) -> str:
    return f"OvfFile(name={disk.file!r}, size={disk.file_size}, compression='')"


@given(
    st.dictionaries(
        st.from_regex(r"[\w() .-]{1,40}", fullmatch=True), st.binary(), min_size=1, max_size=20
    )
)
def test_manifests(files: dict[str, bytes]) -> None:
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    found = read_manifest(write_manifest(sums))
    assert found == {name: ("sha256", sum) for name, sum in sums.items()}
