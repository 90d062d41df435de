"""A Debian kernel package, unpacked: its image and the modules that a guest needs."""

from __future__ import annotations

import lzma
import re
from dataclasses import dataclass
from pathlib import Path

from undercroft.model.errors import UndercroftError
from undercroft.storage.build.elf import module_depends

__all__ = ["Kernel", "KernelModule", "find_kernel", "select_modules"]

_SUFFIX = re.compile(r"\.ko(\.xz)?$")


@dataclass(frozen=True)
class Kernel:
    """Where the parts of a kernel are; ``version`` is what ``uname -r`` says."""

    version: str
    image: Path
    modules: Path


@dataclass(frozen=True)
class KernelModule:
    """A module's name (with underscores) and its content, uncompressed."""

    name: str
    data: bytes


def find_kernel(root: Path) -> Kernel:
    """The newest kernel below ``root`` (an unpacked package).

    Raises:
        UndercroftError: there is none.
    """
    images = sorted((root / "boot").glob("vmlinuz-*"), key=lambda path: _version_key(path.name))
    if not images:
        raise UndercroftError("the kernel package holds no kernel image", object=str(root))
    version = images[-1].name.removeprefix("vmlinuz-")
    for base in (root / "usr/lib/modules", root / "lib/modules"):
        if (base / version).is_dir():
            return Kernel(version, images[-1], base / version)
    raise UndercroftError("the kernel package holds no modules", object=version)


def _version_key(name: str) -> list[int]:
    return [int(part) for part in re.findall(r"[0-9]+", name)]


def select_modules(kernel: Kernel, wanted: list[str]) -> list[KernelModule]:
    """The wanted modules and what they depend on, each after its dependencies.

    A wanted module that is not there is taken to be built in, or not to exist for this kernel.
    """
    files = {
        _SUFFIX.sub("", path.name).replace("-", "_"): path
        for path in kernel.modules.rglob("*.ko*")
        if _SUFFIX.search(path.name)
    }
    chosen: dict[str, KernelModule] = {}

    def add(name: str) -> None:
        if name in chosen or name not in files:
            return
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        for other in module_depends(data):
            add(other)
        chosen[name] = KernelModule(name, data)

    for name in wanted:
        add(name.replace("-", "_"))
    return list(chosen.values())
