import lzma
from pathlib import Path

import pytest

from undercroft.model.errors import UndercroftError
from undercroft.storage.build.kernel import find_kernel, select_modules


def package(root: Path, version: str, modules: dict[str, bytes]) -> None:
    (root / "boot").mkdir(parents=True, exist_ok=True)
    (root / f"boot/vmlinuz-{version}").write_bytes(b"kernel")
    directory = root / f"lib/modules/{version}/kernel"
    directory.mkdir(parents=True)
    for name, depends in modules.items():
        data = b"\0depends=" + depends + b"\0"
        path = directory / name
        path.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)


def test_newest_kernel_is_found_by_number(tmp_path: Path):
    package(tmp_path, "6.1.0-9-amd64", {})
    package(tmp_path, "6.1.0-50-amd64", {})
    assert find_kernel(tmp_path).version == "6.1.0-50-amd64"


def test_no_kernel(tmp_path: Path):
    with pytest.raises(UndercroftError):
        find_kernel(tmp_path)


def test_dependencies_come_first_and_built_in_ones_are_skipped(tmp_path: Path):
    package(
        tmp_path,
        "6.1",
        {"virtio_net.ko": b"net-failover,virtio", "net_failover.ko.xz": b"", "virtio.ko": b""},
    )
    chosen = select_modules(find_kernel(tmp_path), ["virtio_net", "virtio", "ext4"])
    assert [module.name for module in chosen] == ["net_failover", "virtio", "virtio_net"]
    assert chosen[0].data == b"\0depends=\0"
