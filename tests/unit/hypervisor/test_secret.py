"""Keys on their way to QEMU."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import msgspec
import pytest

from tests.unit.hypervisor.plans import emulator, from_disk, overlay
from undercroft.hypervisor.commandline import command_line
from undercroft.hypervisor.line import HandleKind
from undercroft.hypervisor.secret import open_secret


def test_a_command_line_names_keys_and_has_none(tmp_path: Path) -> None:
    (tmp_path / "top").write_text("a" * 64)
    (tmp_path / "below").write_text("b" * 64)
    disk = overlay()
    below = msgspec.structs.replace(disk.backing[0], node="low", key=str(tmp_path / "below"))
    disk = msgspec.structs.replace(
        disk, node="high", key=str(tmp_path / "top"), backing=(below,), thin=False
    )
    line = command_line(from_disk(disks=(disk,)), emulator())
    keys = [handle for handle in line.handles if handle.kind is HandleKind.KEY]
    assert [key.path for key in keys] == [str(tmp_path / "below"), str(tmp_path / "top")]
    numbers = {handle.name: 100 + index for index, handle in enumerate(line.handles)}
    argv = line.with_descriptors(numbers)
    text = "\n".join(argv)
    assert "a" * 64 not in text
    assert "b" * 64 not in text
    nodes = [json.loads(a) for a in argv if a.startswith("{")]
    for node, key in (("low", keys[0]), ("high", keys[1])):
        secret = f"secret,id={node}-key,file=/dev/fd/{numbers[key.name]},format=raw"
        at = argv.index(secret)
        described = next(n for n in nodes if n.get("node-name") == node)
        assert described["encrypt"] == {"format": "luks", "key-secret": f"{node}-key"}
        assert at < argv.index(json.dumps(described, separators=(",", ":")))
    # What is to keep its room does not give any back.
    assert "discard" not in next(n for n in nodes if n.get("node-name") == "high-file")


def test_a_key_is_handed_over_in_memory(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    descriptor = open_secret(str(tmp_path / "key"), None, None)
    try:
        assert not os.get_inheritable(descriptor)
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o400
        assert Path(f"/dev/fd/{descriptor}").read_text() == "secret"
        assert "memfd" in os.readlink(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        open_secret(str(tmp_path / "other"), None, None)
