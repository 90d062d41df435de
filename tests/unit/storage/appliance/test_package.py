"""Packages of others are understood; what is hostile, damaged or lying is refused."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.storage.appliance import packages
from tests.unit.storage.appliance.packages import MiB, archive, manifest, stream
from undercroft.model.errors import ChecksumError, HostileImageError, InvalidError
from undercroft.model.image import DiskFormat
from undercroft.model.vm import DiskBus, Firmware, NicModel
from undercroft.storage.appliance.manifest import verify
from undercroft.storage.appliance.package import Package, open_package
from undercroft.storage.threads import Stop


def look(data: bytes, work: Path, name: str = "it.ova", **about: object) -> Package:
    """What is in a file of this content."""
    path = work / "package"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        package = open_package(fd, name, **about)  # type: ignore[arg-type]
        verify(fd, len(data), None, package.members, package.checksums, Stop())
        return package
    finally:
        os.close(fd)


def test_a_package_of_vmware(tmp_path: Path) -> None:
    found = look(packages.vmware(tmp_path), tmp_path).appliance
    assert (found.name, found.cpus, found.memory) == ("Web Server 01", 4, 2 << 30)
    assert found.firmware is Firmware.UEFI
    assert found.system == "Debian GNU/Linux 11 (64-bit)"
    assert [(d.size, d.bus, d.format) for d in found.disks] == [
        (8 * MiB, DiskBus.SATA, DiskFormat.VMDK),  # its guest has no driver for virtio-scsi
        (3 * MiB, DiskBus.SATA, DiskFormat.VMDK),
    ]
    assert [(p.network, p.model) for p in found.ports] == [
        ("VM Network", NicModel.E1000E),
        ("Storage", NicModel.E1000E),
    ]
    assert found.cdroms == (DiskBus.SATA,)
    assert found.manifest == "sha256"
    told = "\n".join(found.notes)
    for what in ("StorageGroupSection", "vmxnet3", "cpuHotAddEnabled", "graphics"):
        assert what in told


def test_a_package_of_virtualbox(tmp_path: Path) -> None:
    found = look(packages.virtualbox(tmp_path), tmp_path).appliance
    assert (found.name, found.cpus, found.memory) == ("deb (1)", 2, 1 << 30)
    assert found.firmware is Firmware.UEFI  # only VirtualBox's own section says so
    assert found.product == "Debian 12.1 ACME"
    assert [(d.size, d.bus) for d in found.disks] == [(6 * MiB, DiskBus.SATA)]
    assert [p.network for p in found.ports] == ["NAT"]
    assert found.cdroms == (DiskBus.SATA,)
    assert found.manifest == "sha1"
    told = "\n".join(found.notes)
    for what in ("section Machine", "USB", "sound card"):
        assert what in told


def test_a_section_that_must_not_be_left_out_is_refused(tmp_path: Path) -> None:
    extra = "<vmw:QuantumSection><Info>needs a quantum</Info></vmw:QuantumSection>"
    with pytest.raises(HostileImageError, match="QuantumSection"):
        look(packages.vmware(tmp_path, extra=extra), tmp_path)
    extra = extra.replace("<vmw:QuantumSection>", '<vmw:QuantumSection ovf:required="false">')
    found = look(packages.vmware(tmp_path, extra=extra), tmp_path).appliance
    assert "section QuantumSection is left out" in found.notes


def unpacked(data: bytes) -> dict[str, bytes]:
    """The files of an archive."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


def resigned(files: dict[str, bytes]) -> bytes:
    """An archive of these files with a manifest that fits."""
    rest = {name: data for name, data in files.items() if not name.endswith(".mf")}
    return archive({**rest, "Web Server 01.mf": manifest(rest)})


def edited(old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def edit(files: dict[str, bytes]) -> None:
        text = files["Web Server 01.ovf"]
        assert old.encode() in text
        files["Web Server 01.ovf"] = text.replace(old.encode(), new.encode(), 1)

    return edit


def swapped(files: dict[str, bytes]) -> None:
    first, second = "Web Server 01-disk1.vmdk", "Web Server 01-disk2.vmdk"
    files[first], files[second] = files[second], files[first]


HREF = 'ovf:href="Web Server 01-disk1.vmdk"'
HOSTILE = {
    "a path upwards": edited(HREF, 'ovf:href="../../etc/shadow"'),
    "an absolute path": edited(HREF, 'ovf:href="/etc/shadow"'),
    "a path upwards in disguise": edited(HREF, 'ovf:href="..%2f..%2fetc%2fshadow"'),
    "an address": edited(HREF, 'ovf:href="http://198.51.100.1/x.vmdk"'),
    "a file of the host": edited(HREF, 'ovf:href="file:///etc/shadow"'),
    "a file that is not there": edited(HREF, 'ovf:href="other.vmdk"'),
    "sizes of files that lie": edited('ovf:size="', 'ovf:size="1'),
    "a disk larger than stated": edited('ovf:capacity="8"', 'ovf:capacity="7"'),
    "no size at all": edited('ovf:capacity="8"', 'ovf:capacity=""'),
    "a size beyond all bounds": edited("byte * 2^20", "byte * 2^99"),
    "disks the other way round": swapped,
    "a parent": edited('ovf:diskId="vmdisk1"', 'ovf:diskId="vmdisk1" ovf:parentRef="vmdisk2"'),
    "one disk twice": edited("ovf:/disk/vmdisk2", "ovf:/disk/vmdisk1"),
    "a disk that is not there": edited("ovf:/disk/vmdisk2", "ovf:/disk/vmdisk7"),
    "a device of the host": edited("ovf:/disk/vmdisk2", "/dev/sda"),
    "chunks": edited('ovf:id="file1"', 'ovf:id="file1" ovf:chunkSize="100"'),
    "an unknown compression": edited('ovf:id="file1"', 'ovf:id="file1" ovf:compression="lzma"'),
    "gzip that is none": edited('ovf:id="file1"', 'ovf:id="file1" ovf:compression="gzip"'),
    "a device that is needed": edited(">17<", ">117<"),
    "nothing known as envelope": edited("ovf/envelope/1", "ovf/envelope/9"),
    "entities": edited("<!--Generated", '<!DOCTYPE x [<!ENTITY a "aaaa">]><!--Generated'),
    "broken XML": edited("</Envelope>", "</Envelop>"),
    "a memory that is no number": edited(">2048<", ">0x800<"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptors_are_refused(name: str, tmp_path: Path) -> None:
    files = unpacked(packages.vmware(tmp_path))
    HOSTILE[name](files)
    with pytest.raises(HostileImageError) as caught:
        look(resigned(files), tmp_path)
    assert caught.value.code == "image-refused"


@pytest.mark.parametrize("kind", ["sym", "hard", "char", "fifo"])
def test_archives_with_more_than_plain_files_are_refused(kind: str, tmp_path: Path) -> None:
    types = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "char": tarfile.CHRTYPE}
    target = io.BytesIO(packages.vmware(tmp_path))
    with tarfile.open(fileobj=target, mode="a") as tar:
        info = tarfile.TarInfo("extra.vmdk")
        info.type, info.linkname = types.get(kind, tarfile.FIFOTYPE), "/etc/shadow"
        tar.addfile(info)
    with pytest.raises(HostileImageError, match="links"):
        look(target.getvalue(), tmp_path)


@pytest.mark.parametrize("name", ["../x.ovf", "/x.ovf", "a/b.ovf", "..", "x\n.ovf", "a\\b.vmdk"])
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(HostileImageError):
        look(archive({name: b"x"}), tmp_path)


def test_what_was_changed_or_cut_off_is_noticed(tmp_path: Path) -> None:
    data = packages.vmware(tmp_path)
    files = unpacked(data)
    spoilt = bytearray(files["Web Server 01-disk2.vmdk"])
    spoilt[len(spoilt) // 2] ^= 1  # in the middle of a compressed grain
    with pytest.raises(ChecksumError, match="disk2"):
        look(archive({**files, "Web Server 01-disk2.vmdk": bytes(spoilt)}), tmp_path)
    del files["Web Server 01-disk2.vmdk"]
    with pytest.raises(HostileImageError, match="disk2"):
        look(archive(files), tmp_path)
    for length in (100, 512, 5000, len(data) // 2, len(data) - 20_000):
        with pytest.raises((HostileImageError, InvalidError)):
            look(data[:length], tmp_path)


def test_a_manifest_that_leaves_something_out_is_refused(tmp_path: Path) -> None:
    files = unpacked(packages.vmware(tmp_path))
    kept = files["Web Server 01.mf"].splitlines(keepends=True)
    files["Web Server 01.mf"] = b"".join(kept[:-1])
    with pytest.raises(HostileImageError, match="leaves out"):
        look(archive(files), tmp_path)


def test_disks_that_need_other_files_are_refused(tmp_path: Path) -> None:
    """A disk in a package may have no backing file, whatever its format."""
    from tests.unit.storage.samples import qcow2

    files = unpacked(packages.vmware(tmp_path, (8 * MiB,)))
    name = "Web Server 01-disk1.vmdk"
    disk = qcow2(size=8 * MiB, backing=b"/etc/shadow")
    descriptor = files["Web Server 01.ovf"]
    old = f'ovf:size="{len(files[name])}"'.encode()
    files["Web Server 01.ovf"] = descriptor.replace(old, f'ovf:size="{len(disk)}"'.encode())
    files[name] = disk
    with pytest.raises(HostileImageError, match=r"backing|another file"):
        look(resigned(files), tmp_path)
    files[name] = qcow2(size=8 * MiB)
    assert look(resigned(files), tmp_path).appliance.disks[0].format is DiskFormat.QCOW2


def test_of_several_vms_one_has_to_be_chosen(tmp_path: Path) -> None:
    files = unpacked(packages.vmware(tmp_path, (8 * MiB,)))
    text = files["Web Server 01.ovf"].decode()
    start, end = text.index("  <VirtualSystem "), text.index("</Envelope>")
    one = text[start:end]
    both = one + one.replace("Web Server 01", "Other").replace("ovf:/disk/vmdisk1", "ovf:/disk/x")
    text = text[:start] + f'<VirtualSystemCollection ovf:id="c">{both}</VirtualSystemCollection>'
    files["Web Server 01.ovf"] = (text + "</Envelope>").encode()
    with pytest.raises(InvalidError, match="2 VMs: Web Server 01, Other"):
        look(resigned(files), tmp_path)
    found = look(resigned(files), tmp_path, system="Web Server 01").appliance
    assert found.name == "Web Server 01"


def test_a_descriptor_alone_is_explained(tmp_path: Path) -> None:
    text = packages.vmware_descriptor({"x.vmdk": (5, 5 * MiB)})
    with pytest.raises(InvalidError, match="without the disks"):
        look(text, tmp_path, "x.ovf")


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(data=st.data())
def test_damage_anywhere_is_either_noticed_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever becomes of the head of a package: it is understood, or refused with an error of
    ours, and nothing outside of it is ever named."""
    package = getattr(test_damage_anywhere_is_either_noticed_or_harmless, "package", None)
    if package is None:
        package = packages.vmware(tmp_path, (MiB,))
        test_damage_anywhere_is_either_noticed_or_harmless.package = package  # type: ignore[attr-defined]
    spoilt = bytearray(package)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 12_000))
        piece = data.draw(st.binary(max_size=20))
        if data.draw(st.booleans()):
            spoilt[at : at + len(piece)] = piece
        else:
            spoilt[at:at] = piece
    with contextlib.suppress(HostileImageError, InvalidError, ChecksumError):
        found = look(bytes(spoilt), tmp_path)
        assert all(0 <= m.offset <= len(spoilt) - m.size for m in found.members.values())


def test_a_large_stream_within_its_size(tmp_path: Path) -> None:
    """A disk alone, not in any package."""
    raw = packages.content(5 * MiB)
    found = look(stream(raw, tmp_path), tmp_path, "x.vmdk").appliance
    assert [(d.size, d.file) for d in found.disks] == [(5 * MiB, "x.vmdk")]
