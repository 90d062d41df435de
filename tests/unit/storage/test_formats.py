import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.storage import samples
from tests.unit.storage.samples import CLUSTER, extension
from undercroft.model.errors import HostileImageError, InvalidError
from undercroft.model.image import DiskFormat
from undercroft.model.units import GiB, MiB, TiB
from undercroft.storage.formats import Inspected, Limits, inspect, recognise

GOOD = {
    DiskFormat.QCOW2: samples.qcow2(),
    DiskFormat.VMDK: samples.vmdk(),
    DiskFormat.VPC: samples.vhd(kind=3),
    DiskFormat.VHDX: samples.vhdx(),
    DiskFormat.VDI: samples.vdi(),
}


def look(data: bytes, format: DiskFormat, limits: Limits = Limits()) -> Inspected:  # noqa: B008
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        return inspect(fd, format, limits)
    finally:
        os.close(fd)


def guess(data: bytes) -> DiskFormat:
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        return recognise(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("format", GOOD)
def test_good_images_pass_and_are_recognised(format: DiskFormat):
    assert look(GOOD[format], format).virtual_size == 1 * MiB
    assert guess(GOOD[format]) is format


def test_data_size_counts_what_is_there():
    assert look(samples.qcow2(), DiskFormat.QCOW2) == Inspected(1 * MiB, CLUSTER)
    assert look(samples.qcow2(l2_entry=0), DiskFormat.QCOW2).data_size == 0
    assert look(samples.qcow2(version=2), DiskFormat.QCOW2).data_size == CLUSTER


def test_raw_is_never_guessed():
    with pytest.raises(InvalidError) as caught:
        guess(bytes(4096))
    assert "--format raw" in (caught.value.action or "")
    with pytest.raises(InvalidError, match="gzip"):
        guess(b"\x1f\x8b" + bytes(600))
    with pytest.raises(InvalidError, match="of a disc") as caught:
        guess(bytes(16 * 2048) + b"\x01CD001" + bytes(2048))
    assert "--cdrom" in (caught.value.action or "")


def test_raw_is_whole_sectors():
    assert look(b"x" * 1000, DiskFormat.RAW).virtual_size == 1024


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (samples.qcow2(backing=b"/etc/passwd"), "backing file"),
        (samples.qcow2(size=1 << 60), "more than the limit"),
        (samples.qcow2(size=17 * TiB), "more than the limit"),
        (samples.qcow2(size=0), "no size"),
        (samples.qcow2(incompatible=4), "another file"),
        (samples.qcow2(incompatible=2), "marked as corrupt"),
        (samples.qcow2(incompatible=1 << 40), "not known"),
        (samples.qcow2(extensions=extension(0x44415441, b"/etc/shadow")), "another file"),
        (samples.qcow2(extensions=extension(0xE2792ACA, b"raw")), "another file"),
        (samples.qcow2(extensions=extension(0x0537BE77, bytes(16))), "encrypted"),
        (samples.qcow2(extensions=extension(0x1234, b"")[:4] + b"\xff" * 4), "malformed"),
        (samples.qcow2(crypt=1), "encrypted"),
        (samples.qcow2(crypt=2), "encrypted"),
        (samples.qcow2(version=4), "version 4"),
        (samples.qcow2(cluster_bits=8), "clusters"),
        (samples.qcow2(cluster_bits=60), "clusters"),
        (samples.qcow2(l1_size=1 << 31), "too large"),
        (samples.qcow2(l1_size=1 << 20), "outside of the file"),
        (samples.qcow2(size=8 * TiB, l1_size=1), "too small"),
        (samples.qcow2(l1_offset=1 << 50), "outside of the file"),
        (samples.qcow2(l1_offset=100), "where it can be"),
        (samples.qcow2(l1_offset=0), "where it can be"),
        (samples.qcow2(refcount_clusters=1 << 20), "refcount"),
        (samples.qcow2(refcount_clusters=0), "refcount"),
        (samples.qcow2(refcount_offset=1 << 62), "refcount"),
        (samples.qcow2(refcount_order=7), "malformed"),
        (samples.qcow2(snapshots=65000), "snapshots"),
        (samples.qcow2(l2_entry=1 << 40), "outside of the file"),
        (samples.qcow2(l2_entry=5 * CLUSTER + 512), "not aligned"),
        (samples.qcow2(data=b""), "truncated"),
        (samples.qcow2()[:50], "truncated"),
        (samples.qcow2()[: 2 * CLUSTER], "truncated"),
        (b"", "empty"),
        (bytes(1 << 20), "not in qcow2 format"),
    ],
)
def test_hostile_qcow2(image: bytes, reason: str):
    with pytest.raises(HostileImageError, match=reason):
        look(image, DiskFormat.QCOW2)


def test_the_limit_can_be_moved():
    image = samples.qcow2(size=2 * GiB)
    assert look(image, DiskFormat.QCOW2).virtual_size == 2 * GiB
    with pytest.raises(HostileImageError, match="1G"):
        look(image, DiskFormat.QCOW2, Limits(virtual_size=1 * GiB))


DESCRIPTOR = '# Disk DescriptorFile\ncreateType="{}"\nparentCID={}\n{}\n'


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (samples.vmdk(capacity=0), "not possible"),
        (samples.vmdk(capacity=1 << 60), "not possible"),
        (samples.vmdk(capacity=(17 * TiB) // 512), "more than the limit"),
        (samples.vmdk(start=0), "no descriptor"),
        (samples.vmdk(start=1 << 40), "outside of the file|descriptor"),
        (samples.vmdk(length=1 << 30), "too large"),
        (samples.vmdk(grain=3), "malformed"),
        (samples.vmdk(directory=1 << 40), "outside of the file"),
        (samples.vmdk(directory=0xFFFFFFFFFFFFFFFF), "not in VMDK format"),
        (
            samples.vmdk(
                descriptor=DESCRIPTOR.format(
                    "monolithicSparse", "12345678", 'RW 2048 SPARSE "a.vmdk"'
                )
            ),
            "has a parent",
        ),
        (
            samples.vmdk(
                descriptor=DESCRIPTOR.format(
                    "monolithicSparse",
                    "ffffffff",
                    'RW 2048 SPARSE "a.vmdk"\nparentFileNameHint="/etc/passwd"',
                )
            ),
            "has a parent",
        ),
        (
            samples.vmdk(
                descriptor=DESCRIPTOR.format(
                    "monolithicFlat", "ffffffff", 'RW 2048 FLAT "/etc/passwd" 0'
                )
            ),
            "monolithicFlat",
        ),
        (
            samples.vmdk(
                descriptor=DESCRIPTOR.format(
                    "monolithicSparse",
                    "ffffffff",
                    'RW 2048 SPARSE "a"\nRW 2048 FLAT "/etc/passwd" 0',
                )
            ),
            "other files",
        ),
        (b"# Disk DescriptorFile\n" + bytes(500), "names other files"),
        (b"COWD" + bytes(5000), "not in VMDK format"),
    ],
)
def test_hostile_vmdk(image: bytes, reason: str):
    with pytest.raises(HostileImageError, match=reason):
        look(image, DiskFormat.VMDK)


@pytest.mark.parametrize(
    ("image", "format", "reason"),
    [
        (samples.vhd(kind=4), DiskFormat.VPC, "differencing"),
        (samples.vhd(kind=3, size=1 << 60), DiskFormat.VPC, "limit"),
        (samples.vhd(kind=3, size=1 << 30), DiskFormat.VPC, "block table"),
        (samples.vhd()[100000:], DiskFormat.VPC, "truncated"),
        (samples.vhd(kind=7), DiskFormat.VPC, "type 7"),
        (samples.vhdx(flags=2), DiskFormat.VHDX, "differencing"),
        (samples.vhdx(parent=True), DiskFormat.VHDX, "differencing"),
        (samples.vhdx(size=1 << 60), DiskFormat.VHDX, "limit"),
        (samples.vhdx()[: 1 << 20], DiskFormat.VHDX, "truncated"),
        (samples.vdi(parent=b"p" * 16), DiskFormat.VDI, "parent"),
        (samples.vdi(kind=4), DiskFormat.VDI, "differencing"),
        (samples.vdi(size=1 << 60), DiskFormat.VDI, "limit"),
        (samples.vdi()[: 1 << 20], DiskFormat.VDI, "truncated"),
    ],
)
def test_hostile_others(image: bytes, format: DiskFormat, reason: str):
    with pytest.raises(HostileImageError, match=reason):
        look(image, format)


def test_fixed_vhd_is_stated_not_guessed():
    image = samples.vhd(kind=2)
    assert look(image, DiskFormat.VPC).virtual_size == 1 * MiB
    with pytest.raises(InvalidError):
        guess(image)


@given(data=st.binary(max_size=700), format=st.sampled_from(list(GOOD)))
def test_garbage_is_refused(data: bytes, format: DiskFormat):
    with pytest.raises(HostileImageError):
        look(data, format)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    format=st.sampled_from(list(GOOD)),
    changes=st.lists(
        st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4
    ),
    cut=st.one_of(st.none(), st.integers(0, 400_000)),
)
def test_a_damaged_image_is_refused_or_within_the_limits(
    format: DiskFormat, changes: list[tuple[int, bytes]], cut: int | None
):
    image = bytearray(GOOD[format])
    for at, value in changes:
        image[at : at + len(value)] = value
    try:
        found = look(bytes(image[:cut]), format)
    except HostileImageError:
        return
    assert 0 < found.virtual_size <= Limits().virtual_size
    assert found.data_size >= 0


def test_tables_that_point_at_one_another_are_counted_not_followed(tmp_path: Path):
    # Every L1 entry leads to the same L2 table: 8 GiB of data out of a file of 400 KiB.
    image = bytearray(samples.qcow2(size=8 * GiB))
    entry = image[3 * CLUSTER : 3 * CLUSTER + 8]
    image[3 * CLUSTER : 3 * CLUSTER + 8 * 16] = entry * 16
    l2 = image[4 * CLUSTER : 4 * CLUSTER + 8]
    image[4 * CLUSTER : 5 * CLUSTER] = l2 * (CLUSTER // 8)
    assert look(bytes(image), DiskFormat.QCOW2).data_size == 8 * GiB


def test_what_is_called_as_a_disc_is_not_to_be_taken_for_a_raw_disk(tmp_path: Path):
    junk = tmp_path / "junk.ISO"
    junk.write_bytes(b"junk" * 4096)
    with junk.open("rb") as file, pytest.raises(InvalidError) as refused:
        recognise(file.fileno(), name=junk.name)
    assert "--cdrom" in str(refused.value.action)
    assert "raw" not in str(refused.value.action)
