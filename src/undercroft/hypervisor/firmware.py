"""UEFI firmware images, found through the descriptors that packages install.

Format: QEMU's ``docs/interop/firmware.json``. Directories are searched in the order that it
prescribes; a file in an earlier directory hides one of the same name in a later, and an empty one
hides it altogether; then names decide the priority (``40-…`` before ``50-…``).
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

import msgspec

from undercroft.model.base import Model
from undercroft.model.errors import UnsupportedError
from undercroft.model.vm import Machine

__all__ = ["DESCRIPTOR_DIRECTORIES", "FirmwareFiles", "find_firmware"]

DESCRIPTOR_DIRECTORIES = (
    Path("/etc/qemu/firmware"),
    Path("/usr/local/share/qemu/firmware"),
    Path("/usr/share/qemu/firmware"),
)

_BOARDS = {Machine.Q35: "pc-q35-10.0", Machine.VIRT: "virt-10.0"}
_PACKAGES = {"x86_64": "ovmf", "aarch64": "qemu-efi-aarch64", "riscv64": "qemu-efi-riscv64"}


class FirmwareFiles(Model, frozen=True, kw_only=True):
    """A firmware: code to execute, and the template of its variables. Both raw.

    ``smm``: it keeps its variables behind system management mode.
    """

    code: str
    variables: str
    smm: bool = False


class _File(Model, frozen=True, kw_only=True):
    filename: str
    format: str = "raw"


class _Mapping(Model, frozen=True, kw_only=True):
    device: str
    mode: str = "split"
    executable: _File | None = None
    nvram_template: _File | None = msgspec.field(default=None, name="nvram-template")


class _Target(Model, frozen=True, kw_only=True):
    architecture: str
    machines: list[str]


class _Descriptor(Model, frozen=True, kw_only=True):
    interface_types: list[str] = msgspec.field(name="interface-types")
    mapping: _Mapping
    targets: list[_Target]
    features: list[str]


def find_firmware(
    arch: str,
    machine: Machine,
    *,
    secure_boot: bool,
    directories: tuple[Path, ...] = DESCRIPTOR_DIRECTORIES,
) -> FirmwareFiles:
    """The UEFI for a board. With ``secure_boot`` it has Microsoft's keys enrolled and enforces
    them; without, it does not know the feature.

    Raises:
        UnsupportedError: none is installed.
    """
    board = _BOARDS.get(machine)
    if board is not None:
        for path in _descriptor_files(directories):
            files = _read(path, arch, board, secure_boot)
            if files is not None:
                return files
    kind = "UEFI with secure boot" if secure_boot else "UEFI"
    raise UnsupportedError(
        f"no {kind} firmware for {arch} {machine.value} machines is installed",
        action=f"install the package {_PACKAGES.get(arch, 'with UEFI firmware')}"
        if board
        else "use firmware kernel or bios",
    )


def _descriptor_files(directories: tuple[Path, ...]) -> list[Path]:
    found: dict[str, Path] = {}
    for directory in directories:
        if directory.is_dir():
            for path in directory.glob("*.json"):
                found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def _read(path: Path, arch: str, board: str, secure_boot: bool) -> FirmwareFiles | None:
    try:
        descriptor = msgspec.json.decode(path.read_bytes(), type=_Descriptor)
    except (OSError, msgspec.MsgspecError):
        return None  # empty: hidden on purpose; otherwise not ours to repair
    mapping = descriptor.mapping
    if (
        "uefi" not in descriptor.interface_types
        or mapping.device != "flash"
        or mapping.mode != "split"
        or mapping.executable is None
        or mapping.nvram_template is None
        or {mapping.executable.format, mapping.nvram_template.format} != {"raw"}
    ):
        return None
    if not any(
        target.architecture == arch
        and any(fnmatch.fnmatch(board, pattern) for pattern in target.machines)
        for target in descriptor.targets
    ):
        return None
    enrolled = {"secure-boot", "enrolled-keys"} <= set(descriptor.features)
    if enrolled != secure_boot or (not secure_boot and "secure-boot" in descriptor.features):
        return None
    files = (mapping.executable.filename, mapping.nvram_template.filename)
    if not all(Path(name).is_file() for name in files):
        return None
    smm = "requires-smm" in descriptor.features
    return FirmwareFiles(code=files[0], variables=files[1], smm=smm)
