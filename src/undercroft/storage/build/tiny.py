"""Builds ``tiny``: busybox, Debian's cloud kernel and the guest agent, in an initramfs.

It runs from memory alone, is up in a second or two even without hardware virtualization, and
needs no disk. Nothing is installed on the host; no root is needed.
"""

from __future__ import annotations

import asyncio
import re
from importlib.resources import files
from pathlib import Path

from undercroft.model.errors import UndercroftError
from undercroft.model.image import ImageContent, ImageDefaults
from undercroft.model.units import MiB
from undercroft.storage.build.apt import SUITES, PrivateApt, find_sources
from undercroft.storage.build.cpio import CpioWriter
from undercroft.storage.build.elf import ElfError, needed
from undercroft.storage.build.initrd import add_busybox, find_busybox
from undercroft.storage.build.kernel import KernelModule, find_kernel, select_modules
from undercroft.storage.build.vmlinux import write_kernel
from undercroft.storage.process import Progress, no_progress, run, share_of

__all__ = ["READY_LINE", "build_tiny"]

READY_LINE = "undercroft tiny: ready"

# In this order, before the ready line: what makes the guest's devices appear.
_FIRST = ["virtio_pci", "virtio_mmio", "virtio_console", "virtio_blk", "virtio_net"]
# After it, in the background.
_LATER = [
    "virtio_rng", "virtio_balloon", "virtio_mem", "pvpanic_pci", "pvpanic_mmio",
    "button", "evdev", "overlay",
    # Disks on the other buses, which may be plugged in at any time, and CD-ROMs.
    "virtio_scsi", "sd_mod", "sr_mod", "nvme", "ahci", "isofs",
]  # fmt: skip
# The agent's libraries are in these packages; their names gain a suffix in later suites (t64).
_LIBRARY_PACKAGES = re.compile(
    r"(libc6|libgcc-s1|libglib2\.0-0|libpcre2-8-0|libnuma1|libudev1|libcap2|liburing2|zlib1g"
    r"|libffi8|libatomic1)(t64)?"
)
_AGENT = "usr/sbin/qemu-ga"
# Library directories of Debian's packages, before and after the merge of / and /usr.
_LIBRARY_DIRECTORIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
# no_timer_check: on a busy host the kernel's test of its timer takes too long and misleads it.
_KERNEL_ARGUMENTS = "console=tty0 console=ttyS0,115200 no_timer_check quiet"


async def build_tiny(
    target: Path,
    tmp: Path,
    *,
    release: str = "12",
    mirror: str | None = None,
    progress: Progress = no_progress,
) -> ImageContent:
    """Builds the image's files, ``kernel`` and ``initrd``, into the empty directory ``target``.

    ``release`` is the Debian release (``12``) the parts come from; ``tmp`` is an existing
    directory, where everything half-made stays. Cancelling stops every program started.

    Returns:
        What the image is, with ``files`` left empty: the image store fills it in.

    Raises:
        FetchError: a package could not be fetched or verified.
        InvalidError: no such release, or no mirror known.
        MissingToolError: apt or dpkg is not installed.
    """
    suite = SUITES.get(release, release)
    progress(0.0, "reading package lists")
    apt = PrivateApt(tmp / "apt", await find_sources(suite, mirror))
    await apt.update()
    progress(0.2, "choosing packages")
    plan = await apt.plan("busybox-static", "qemu-guest-agent", "linux-image-cloud-amd64")
    wanted = [
        package
        for package in plan
        if package.name in ("busybox-static", "qemu-guest-agent")
        or re.fullmatch(r"linux-image-[0-9].*", package.name)
        or _LIBRARY_PACKAGES.fullmatch(package.name)
    ]
    debs = await apt.fetch(wanted, share_of(progress, 0.25, 0.7))
    progress(0.7, "unpacking packages")
    root = tmp / "root"
    root.mkdir()
    await apt.unpack(debs, root)
    progress(0.9, "writing the initramfs")
    busybox = find_busybox(root)
    applets = (await run([str(busybox), "--list-full"], timeout=30)).decode().split()
    await asyncio.to_thread(_assemble, root, busybox, applets, target)
    await write_kernel(find_kernel(root).image, target / "kernel")
    progress(1.0, "done")
    return ImageContent(
        arch="x86_64",
        os=f"tiny (busybox, Debian {release} kernel)",
        kernel="kernel",
        initrd="initrd",
        kernel_arguments=_KERNEL_ARGUMENTS,
        agent=True,
        ready_line=READY_LINE,
        # All that it has to show comes over the serial port.
        defaults=ImageDefaults(
            cpus=1, memory=128 * MiB, machine="q35", firmware="kernel", display="none"
        ),
    )


def _assemble(root: Path, busybox: Path, applets: list[str], target: Path) -> None:
    kernel = find_kernel(root)
    first = select_modules(kernel, _FIRST)
    names = {module.name for module in first}
    later = [m for m in select_modules(kernel, _LATER) if m.name not in names]
    with (target / "initrd").open("wb") as out:
        archive = CpioWriter(out)
        _add_base(archive)
        add_busybox(archive, busybox, applets)
        _add_agent(archive, root)
        _add_modules(archive, "first", first)
        _add_modules(archive, "later", later)
        archive.close()


def _text(name: str) -> bytes:
    return files("undercroft.storage.build").joinpath("tiny_files", name).read_bytes()


def _add_base(archive: CpioWriter) -> None:
    for path in ("dev", "proc", "sys", "run", "mnt", "var", "usr/bin", "sbin", "etc/acpi/PWRF"):
        archive.directory(path)
    archive.directory("root", 0o700)
    archive.directory("tmp", 0o1777)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", _text("init"), 0o755)
    for name in ("rest", "agent", "udhcpc.script"):
        archive.file(f"etc/{name}", _text(name), 0o755)
    archive.file("sbin/shutdown", _text("shutdown"), 0o755)
    archive.file("etc/acpi/PWRF/00000080", b"#!/bin/sh\nexec /sbin/shutdown -P\n", 0o755)
    for name in ("inittab", "profile", "os-release"):
        archive.file(f"etc/{name}", _text(name))
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.file("etc/shadow", b"root:*:::::::\n", 0o600)
    archive.file("etc/hosts", b"127.0.0.1 localhost\n")
    archive.symlink("var/run", "../run")


def _add_agent(archive: CpioWriter, root: Path) -> None:
    """The agent, its libraries and the dynamic loader, found through their ELF headers."""
    archive.file(_AGENT, (root / _AGENT).read_bytes(), 0o755)
    pending = [_AGENT]
    done: set[str] = set()
    while pending:
        for name in _needed(root, pending.pop()):
            library = name.rpartition("/")[2]
            if library in done:
                continue
            done.add(library)
            path = _library(root, library)
            # The interpreter is named by its full path, libraries are looked for by name.
            place = name.lstrip("/") if name.startswith("/") else f"lib/{library}"
            archive.file(place, (root / path).read_bytes(), 0o755)
            pending.append(path)


def _needed(root: Path, path: str) -> list[str]:
    try:
        return needed((root / path).read_bytes())
    except ElfError as error:
        raise UndercroftError(f"{path}: {error}", object="tiny") from error


def _library(root: Path, name: str) -> str:
    for directory in _LIBRARY_DIRECTORIES:
        if (root / directory / name).is_file():
            return f"{directory}/{name}"
    raise UndercroftError(
        f"the guest agent needs {name}, which none of the fetched packages has", object="tiny"
    )


def _add_modules(archive: CpioWriter, name: str, modules: list[KernelModule]) -> None:
    """The modules, and the order in which to load them."""
    for module in modules:
        archive.file(f"lib/modules/{module.name}.ko", module.data)
    listing = "".join(f"{module.name}.ko\n" for module in modules)
    archive.file(f"lib/modules/{name}", listing.encode())
