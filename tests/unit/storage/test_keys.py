"""Keys of layers."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from undercroft.model.errors import DataError
from undercroft.storage.keys import Keys, read_key


def test_a_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    path = keys.make("layer-1")
    key = read_key(path)
    assert len(bytes.fromhex(key.decode())) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "layer-2.half").write_bytes(b"what a daemon left that died")
    assert keys.make("layer-1").read_bytes() == key
    assert keys.make("layer-2").read_bytes() != key
    keys.copy("layer-1", "layer-3")
    assert read_key(keys.path("layer-3")) == key
    assert keys.known() == ["layer-1", "layer-2", "layer-3"]
    for _ in range(2):
        keys.remove("layer-1")
    assert keys.known() == ["layer-2", "layer-3"]


def test_a_key_that_is_gone_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="layer-1") as caught:
        Keys(tmp_path).copy("layer-1", "layer-2")
    assert str(tmp_path / "layer-1") in str(caught.value.action)
    assert list(tmp_path.iterdir()) == []
