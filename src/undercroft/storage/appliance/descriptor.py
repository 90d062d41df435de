"""Descriptors written: what VMware, VirtualBox and virt-v2v accept, and our own reader.

OVF 1.1 (DSP0243), as those do not take 2.0 alike. What has no place there goes into a section of
our own that nobody else has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

from undercroft.model.units import MiB
from undercroft.model.vm import DiskBus, Firmware, NicModel, PortMode
from undercroft.storage.appliance.ovf import OWN

__all__ = ["OutDisk", "OutMachine", "OutPort", "write_descriptor"]

_STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
_WIDEST = 10**20 - 1  # what no size reaches, to know how long a descriptor can become


@dataclass(frozen=True)
class OutDisk:
    """A disk: the name and size of its file, its size as the guest sees it, and its bus."""

    file: str
    file_size: int
    size: int
    bus: DiskBus

    def widest(self) -> OutDisk:
        """The same with a size of the file that takes the most room to write."""
        return OutDisk(self.file, _WIDEST, self.size, self.bus)


@dataclass(frozen=True)
class OutPort:
    """A network adapter."""

    mode: PortMode
    model: NicModel
    mac: str


@dataclass(frozen=True)
class OutMachine:
    """A VM as it is described. Memory in bytes. ``nvram``: name and size of the file with its
    firmware's settings; ``image``: digest of the image whose kernel it boots."""

    name: str
    id: str
    cpus: int
    memory: int
    arch: str
    firmware: Firmware
    secure_boot: bool
    tpm: bool
    disks: Sequence[OutDisk]
    ports: Sequence[OutPort]
    cdroms: Sequence[DiskBus] = ()
    nvram: tuple[str, int] | None = None
    image: str | None = None


def write_descriptor(machine: OutMachine) -> bytes:
    """The descriptor of a VM."""
    files = [(disk.file, disk.file_size) for disk in machine.disks]
    if machine.nvram is not None:
        files.append(machine.nvram)
    networks = sorted({str(port.mode) for port in machine.ports})
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"'
        ' xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"'
        ' xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/'
        'CIM_ResourceAllocationSettingData"'
        ' xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/'
        'CIM_VirtualSystemSettingData"'
        ' xmlns:vmw="http://www.vmware.com/schema/ovf"'
        f' xmlns:undercroft="{OWN}">',
        "  <References>",
        *(
            f"    <File ovf:id={_q(f'file{n}')} ovf:href={_q(name)} ovf:size={_q(size)}/>"
            for n, (name, size) in enumerate(files, 1)
        ),
        "  </References>",
    ]
    if machine.disks:
        lines += ["  <DiskSection>", "    <Info>Virtual disks</Info>"]
        lines += [
            f"    <Disk ovf:diskId={_q(f'vmdisk{n}')} ovf:fileRef={_q(f'file{n}')}"
            f' ovf:capacity={_q(disk.size)} ovf:capacityAllocationUnits="byte"'
            f" ovf:format={_q(_STREAM)}/>"
            for n, disk in enumerate(machine.disks, 1)
        ]
        lines.append("  </DiskSection>")
    lines += ["  <NetworkSection>", "    <Info>Logical networks</Info>"]
    for network in networks:
        lines += [
            f"    <Network ovf:name={_q(network)}>",
            f"      <Description>Undercroft network {network}</Description>",
            "    </Network>",
        ]
    lines += [
        "  </NetworkSection>",
        f"  <VirtualSystem ovf:id={_q(machine.id)}>",
        "    <Info>A virtual machine</Info>",
        f"    <Name>{machine.name}</Name>",
        '    <OperatingSystemSection ovf:id="101" vmw:osType="otherLinux64Guest">',
        "      <Info>The guest operating system</Info>",
        "      <Description>Linux (64-bit)</Description>",
        "    </OperatingSystemSection>",
        *_hardware(machine),
        *_own(machine, len(files)),
        "  </VirtualSystem>",
        "</Envelope>",
    ]
    return ("\n".join(lines) + "\n").encode()


def _hardware(machine: OutMachine) -> list[str]:
    lines = [
        "    <VirtualHardwareSection>",
        "      <Info>Virtual hardware</Info>",
        "      <System>",
        "        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>",
        "        <vssd:InstanceID>0</vssd:InstanceID>",
        f"        <vssd:VirtualSystemIdentifier>{machine.name}</vssd:VirtualSystemIdentifier>",
        "        <vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType>",
        "      </System>",
        *_item(
            AllocationUnits="hertz * 10^6",
            Description="Number of virtual CPUs",
            ElementName=f"{machine.cpus} virtual CPUs",
            InstanceID=1,
            ResourceType=3,
            VirtualQuantity=machine.cpus,
        ),
        *_item(
            AllocationUnits="byte * 2^20",
            Description="Memory size",
            ElementName=f"{machine.memory // MiB} MB of memory",
            InstanceID=2,
            ResourceType=4,
            VirtualQuantity=machine.memory // MiB,
        ),
    ]
    scsi = [n for n, disk in enumerate(machine.disks) if disk.bus is DiskBus.SCSI]
    sata = [n for n in range(len(machine.disks)) if n not in scsi]
    controllers = {}
    if sata or machine.cdroms:
        controllers.update(dict.fromkeys(sata, 3))
        lines += _item(
            Address=0,
            Description="SATA controller",
            ElementName="SATA controller 0",
            InstanceID=3,
            ResourceSubType="vmware.sata.ahci",
            ResourceType=20,
        )
    if scsi:
        controllers.update(dict.fromkeys(scsi, 4))
        lines += _item(
            Address=0,
            Description="SCSI controller",
            ElementName="SCSI controller 0",
            InstanceID=4,
            ResourceSubType="VirtualSCSI",
            ResourceType=6,
        )
    for n in range(len(machine.disks)):
        own = [m for m, controller in controllers.items() if controller == controllers[n]]
        place = own.index(n)
        lines += _item(
            # VMware's SCSI controllers have number 7 themselves.
            AddressOnParent=place + (controllers[n] == 4 and place >= 7),
            ElementName=f"Hard disk {n + 1}",
            HostResource=f"ovf:/disk/vmdisk{n + 1}",
            InstanceID=10 + n,
            Parent=controllers[n],
            ResourceType=17,
        )
    for n in range(len(machine.cdroms)):
        lines += _item(
            'ovf:required="false"',
            AddressOnParent=len(sata) + n,
            AutomaticAllocation="false",
            ElementName=f"CD/DVD drive {n + 1}",
            InstanceID=70 + n,
            Parent=3,
            ResourceSubType="vmware.cdrom.remotepassthrough",
            ResourceType=15,
        )
    for n, port in enumerate(machine.ports):
        lines += _item(
            AddressOnParent=7 + n,
            AutomaticAllocation="true",
            Connection=str(port.mode),
            Description=f"Network adapter on {port.mode}",
            ElementName=f"Network adapter {n + 1}",
            InstanceID=40 + n,
            ResourceSubType="E1000e" if port.model is NicModel.E1000E else "VmxNet3",
            ResourceType=10,
        )
    if machine.tpm:
        lines += _item(
            'ovf:required="false"',
            AutomaticAllocation="false",
            ElementName="Virtual TPM",
            InstanceID=60,
            ResourceSubType="vmware.vtpm",
            ResourceType=1,
        )
    if machine.firmware is Firmware.UEFI:
        lines.append('      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>')
    if machine.secure_boot:
        lines.append(
            '      <vmw:Config ovf:required="false" vmw:key="bootOptions.efiSecureBootEnabled"'
            ' vmw:value="true"/>'
        )
    return [*lines, "    </VirtualHardwareSection>"]


def _own(machine: OutMachine, files: int) -> list[str]:
    values = {"firmware": str(machine.firmware), "arch": machine.arch}
    if machine.image is not None:
        values["image"] = machine.image
    if machine.nvram is not None:
        values["nvram"] = f"file{files}"
    attributes = " ".join(f"undercroft:{key}={_q(value)}" for key, value in values.items())
    return [
        f'    <undercroft:MachineSection ovf:required="false" {attributes}>',
        "      <Info>What only Undercroft knows</Info>",
        *(
            f"      <undercroft:Disk undercroft:disk={_q(f'vmdisk{n}')}"
            f" undercroft:bus={_q(disk.bus)}/>"
            for n, disk in enumerate(machine.disks, 1)
        ),
        *(f"      <undercroft:Cdrom undercroft:bus={_q(bus)}/>" for bus in machine.cdroms),
        *(
            f"      <undercroft:Port undercroft:model={_q(port.model)}"
            f" undercroft:network={_q(port.mode)}/>"
            for port in machine.ports
        ),
        "    </undercroft:MachineSection>",
    ]


def _item(attributes: str = "", **values: object) -> list[str]:
    """A device. Its parts are in the order of their names, as their schema wants it."""
    head = f"      <Item {attributes}>" if attributes else "      <Item>"
    parts = [f"        <rasd:{key}>{value}</rasd:{key}>" for key, value in sorted(values.items())]
    return [head, *parts, "      </Item>"]


def _q(value: object) -> str:
    return quoteattr(str(value))
