"""A small initrd for booting a full system's kernel directly: busybox and the disk's drivers."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from undercroft.model.errors import UndercroftError
from undercroft.storage.build.cpio import CpioWriter
from undercroft.storage.build.kernel import find_kernel, select_modules

__all__ = ["add_busybox", "find_busybox", "write_boot_initrd"]

_FIRST = ["virtio_pci", "virtio_mmio", "virtio_blk", "crc32c_generic", "ext4"]
# For disks on other buses, tried when the root does not appear.
_LATER = ["virtio_scsi", "sd_mod", "ahci", "nvme"]
_APPLETS = (
    "sh", "mount", "insmod", "findfs", "switch_root", "mkdir", "usleep", "ls", "cat", "dmesg",
)  # fmt: skip


def find_busybox(root: Path) -> Path:
    """The program in an unpacked busybox-static.

    Raises:
        UndercroftError: it is not there.
    """
    for path in (root / "usr/bin/busybox", root / "bin/busybox"):
        if path.is_file():
            return path
    raise UndercroftError("the package busybox-static holds no busybox")


def add_busybox(archive: CpioWriter, busybox: Path, applets: list[str]) -> None:
    """busybox, with links for its applets (relative paths)."""
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in applets:
        if applet != "bin/busybox":
            archive.symlink(applet, "/bin/busybox")


def write_boot_initrd(root: Path, loaders: Path, target: Path) -> None:
    """Writes ``initrd`` into ``target``, from the modules in ``root`` and the busybox in
    ``loaders``."""
    kernel = find_kernel(root)
    first = select_modules(kernel, _FIRST)
    names = {module.name for module in first}
    later = [m for m in select_modules(kernel, _LATER) if m.name not in names]
    init = files("undercroft.storage.build").joinpath("debian_files", "init").read_bytes()
    with (target / "initrd").open("wb") as out:
        archive = CpioWriter(out)
        for path in ("dev", "proc", "sys"):
            archive.directory(path)
        archive.character_device("dev/console", 5, 1)
        archive.file("init", init, 0o755)
        add_busybox(archive, find_busybox(loaders), [f"bin/{name}" for name in _APPLETS])
        for module in (*first, *later):
            archive.file(f"lib/modules/{module.name}.ko", module.data)
        for name, modules in (("first", first), ("later", later)):
            listing = "".join(f"{module.name}.ko\n" for module in modules)
            archive.file(f"lib/modules/{name}", listing.encode())
        archive.close()
