"""What a repository is told to be damaged in."""

from undercroft.host.backups import damage


def test_each_that_is_damaged_is_named():
    found = {"bk-1": ["a map is damaged"], "bk-2": ["its manifest is damaged", "more"]}
    told = "2 of 3 backups are damaged: bk-1: a map is damaged; bk-2: its manifest is damaged"
    assert damage(found, 3) == told
    many = damage({f"bk-{n}": ["x"] for n in range(12)}, 12)
    assert many.endswith("bk-9: x; and 2 others")
