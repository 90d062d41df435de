"""Which parts of a disk have changed."""

from undercroft.host.reading import rounded, with_grown

MIB = 1 << 20


def test_all_that_a_disk_has_grown_by_has_changed():
    parts = [(MIB, 4096), (12 * MIB, 65536)]  # the latter in what it has grown by
    assert list(rounded(with_grown(parts, 8 * MIB, 16 * MIB), 16 * MIB)) == [
        (MIB, 65536),
        (8 * MIB, 8 * MIB),
    ]
    assert with_grown(parts, 16 * MIB, 16 * MIB) == parts
