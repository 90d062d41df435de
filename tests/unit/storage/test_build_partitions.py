import itertools
import struct
import zlib
from pathlib import Path

import pytest

from undercroft.model.errors import UndercroftError
from undercroft.model.units import MiB
from undercroft.storage.build.partitions import (
    BIOS,
    ESP,
    ROOT,
    install_bios_loader,
    partition,
    root_size,
)

SIZE = 128 * MiB


def header(disk: bytes, sector: int) -> tuple[dict[str, int], bytes]:
    """A GPT header's fields and the partition entries that it leads to, checksums verified."""
    raw = disk[sector * 512 : sector * 512 + 92]
    (magic, revision, length, crc, _, here, other, first, last, _, table, count, size, tcrc) = (
        struct.unpack("<8sIIIIQQQQ16sQIII", raw)
    )
    assert (magic, revision, length) == (b"EFI PART", 0x10000, 92)
    assert crc == zlib.crc32(raw[:16] + bytes(4) + raw[20:])
    entries = disk[table * 512 : table * 512 + count * size]
    assert tcrc == zlib.crc32(entries)
    return {"here": here, "other": other, "first": first, "last": last}, entries


def test_both_tables_are_valid_and_agree(tmp_path: Path):
    path = tmp_path / "disk"
    partition(path, SIZE)
    disk = path.read_bytes()
    assert len(disk) == SIZE
    sectors = SIZE // 512
    primary, entries = header(disk, 1)
    backup, copy = header(disk, sectors - 1)
    assert entries == copy
    assert (primary["here"], primary["other"]) == (1, sectors - 1)
    assert (backup["here"], backup["other"]) == (sectors - 1, 1)
    assert (primary["first"], primary["last"]) == (34, sectors - 34)
    assert disk[510:512] == b"\x55\xaa"
    assert disk[446 + 4] == 0xEE
    spans = [struct.unpack_from("<QQ", entries, index * 128 + 32) for index in range(3)]
    assert [start * 512 for start, _ in spans] == [BIOS.start, ESP.start, ROOT.start]
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end < start
    assert spans[-1][1] <= primary["last"]
    assert (spans[-1][1] + 1) * 512 == ROOT.start + root_size(SIZE)


def test_each_disk_is_another(tmp_path: Path):
    for name in "ab":
        partition(tmp_path / name, SIZE)
    assert (tmp_path / "a").read_bytes()[:1024] != (tmp_path / "b").read_bytes()[:1024]


def test_bios_loader_keeps_the_partition_table(tmp_path: Path):
    path = tmp_path / "disk"
    partition(path, SIZE)
    before = path.read_bytes()
    core = b"\x11" * 512 + b"\x22" * 1000
    install_bios_loader(path, b"\x33" * 510 + b"\x55\xaa", core)
    disk = path.read_bytes()
    assert disk[0x1B8:512] == before[0x1B8:512]
    assert disk[512 : BIOS.start] == before[512 : BIOS.start]
    first = BIOS.start // 512
    assert struct.unpack_from("<Q", disk, 0x5C) == (first,)
    placed = disk[BIOS.start : BIOS.start + len(core)]
    start, length = struct.unpack_from("<QH", placed, 500)
    assert (start, length) == (first + 1, 2)  # 1000 bytes are two sectors
    assert placed[512:] == core[512:]


@pytest.mark.parametrize("core", [b"", bytes(512), bytes(2 * MiB)])
def test_a_loader_that_cannot_fit(tmp_path: Path, core: bytes):
    path = tmp_path / "disk"
    partition(path, SIZE)
    with pytest.raises(UndercroftError):
        install_bios_loader(path, bytes(512), core)
