"""Builds ``debian:12`` and its successors: a whole Debian, ready for cloud-init.

mmdebstrap makes the system; it becomes a disk with boot loaders for BIOS and UEFI (with Debian's
signed shim, so also for secure boot), without mounting anything. Kernel and a small initrd of our
own lie beside the disk for direct boot, which is the fastest.
"""

from __future__ import annotations

import asyncio
import os
import tarfile
from importlib.resources import files
from pathlib import Path

from undercroft.model.errors import InvalidError, MissingToolError, ProgramError, UndercroftError
from undercroft.model.image import DiskFormat, ImageContent, ImageDefaults
from undercroft.model.units import GiB, MiB
from undercroft.storage.build.apt import SUITES, PrivateApt, find_sources, keyring
from undercroft.storage.build.initrd import write_boot_initrd
from undercroft.storage.build.kernel import find_kernel
from undercroft.storage.build.partitions import (
    ROOT,
    install_bios_loader,
    make_esp,
    partition,
    root_size,
)
from undercroft.storage.build.vmlinux import write_kernel
from undercroft.storage.files import remove_tree
from undercroft.storage.process import Progress, no_progress, run, share_of, tool

__all__ = ["build_debian"]

_PACKAGES = [
    "systemd", "systemd-sysv", "systemd-resolved", "libpam-systemd", "udev", "dbus",
    "cloud-init", "cloud-guest-utils", "qemu-guest-agent", "openssh-server", "sudo",
    "e2fsprogs", "iproute2", "iputils-ping", "less", "nano", "ca-certificates",
    "linux-image-amd64", "initramfs-tools", "zstd", "grub-pc-bin", "grub2-common",
]  # fmt: skip
_DPKG_OPTIONS = [
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
]
_DISK_SIZE = 2 * GiB
_KERNEL_ARGUMENTS = (
    "root=LABEL=debian-root rw console=tty0 console=ttyS0,115200 no_timer_check quiet"
)
# What mmdebstrap says, and how much of its work is done by then (measured).
_STEPS = {
    "running apt-get update": 0.0,
    "downloading packages": 0.03,
    "extracting archives": 0.08,
    "installing essential packages": 0.12,
    "installing remaining packages": 0.2,
    "running --customize-hook": 0.9,
    "creating tarball": 0.95,
}


async def build_debian(
    target: Path,
    tmp: Path,
    *,
    release: str = "12",
    mirror: str | None = None,
    progress: Progress = no_progress,
) -> ImageContent:
    """Builds the image's files, ``disk.qcow2``, ``kernel`` and ``initrd``, into ``target``.

    ``release`` is the Debian release (``12``); ``tmp`` is an existing directory, where everything
    half-made stays. As an ordinary user this needs subordinate ids (uidmap, /etc/subuid) and
    fakeroot. Cancelling stops every program started.

    Returns:
        What the image is, with ``files`` left empty: the image store fills it in.

    Raises:
        FetchError: a package could not be fetched or verified.
        InvalidError: no such release, or no mirror known.
        MissingToolError: a tool is not installed.
        ProgramError: a step failed; the message has what it said.
    """
    suite = _suite(release)
    for name, package in _TOOLS.items():
        tool(name, package=package)
    progress(0.0, "reading package lists")
    sources = await find_sources(suite, mirror)
    apt = PrivateApt(tmp / "apt", sources)
    await apt.update()
    loaders = await _fetch_loaders(apt, tmp / "loaders")
    tarball = tmp / "root.tar"
    lines = "".join(source.line(keyring()) + "\n" for source in sources)
    await _bootstrap(suite, lines, tarball, tmp, share_of(progress, 0.08, 0.85))
    progress(0.85, "making the file system")
    disk = tmp / "disk.raw"
    await asyncio.to_thread(partition, disk, _DISK_SIZE)
    await _make_root(tarball, disk, tmp)
    progress(0.9, "making it bootable")
    boot, core = await asyncio.to_thread(_write_boot_files, tarball, loaders, target, tmp)
    await write_kernel(find_kernel(tmp / "boot").image, target / "kernel")
    await asyncio.to_thread(install_bios_loader, disk, boot, core)
    await make_esp(disk, tmp, _esp_files(loaders, tmp))
    progress(0.93, "converting the disk")
    await run(
        [
            tool("qemu-img", package="qemu-utils"), "convert", "-f", "raw", "-O", "qcow2",
            "-o", "lazy_refcounts=off", str(disk), str(target / "disk.qcow2"),
        ],
        timeout=600,
    )  # fmt: skip
    await asyncio.to_thread(disk.unlink)
    progress(1.0, "done")
    return ImageContent(
        arch="x86_64",
        os=f"debian {release}",
        disk="disk.qcow2",
        disk_format=DiskFormat.QCOW2,
        virtual_size=_DISK_SIZE,
        kernel="kernel",
        initrd="initrd",
        kernel_arguments=_KERNEL_ARGUMENTS,
        cloud_init=True,
        agent=True,
        ssh=True,
        ready_line=" login: ",
        defaults=ImageDefaults(
            cpus=1, memory=512 * MiB, machine="q35", firmware="kernel", user="debian"
        ),
    )


_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "qemu-img": "qemu-utils",
    "tar": "tar",
}


def _suite(release: str) -> str:
    if release in SUITES:
        return SUITES[release]
    if release in SUITES.values():
        return release
    raise InvalidError(
        f"Debian {release[:40]!r} is not known",
        action=f"choose one of: {', '.join(f'debian:{number}' for number in SUITES)}",
    )


async def _fetch_loaders(apt: PrivateApt, root: Path) -> Path:
    """The signed boot loaders, and busybox for the initrd; unpacked, not installed."""
    names = ("shim-signed", "grub-efi-amd64-signed", "busybox-static")
    plan = await apt.plan(*names, "shim-helpers-amd64-signed")
    wanted = [p for p in plan if p.name in (*names, "shim-helpers-amd64-signed")]
    root.mkdir()
    await apt.unpack(await apt.fetch(wanted), root)
    return root


def _hook(name: str) -> str:
    return files("undercroft.storage.build").joinpath("debian_files", name).read_text()


async def _bootstrap(
    suite: str, sources: str, tarball: Path, tmp: Path, progress: Progress
) -> None:
    """Makes the system as a tar archive, which keeps owners whoever we are."""
    if os.geteuid() == 0:
        mode, scratch = "root", tmp
    else:
        # The subordinate ids that own the files cannot enter our directories.
        mode, scratch = "unshare", Path("/tmp")  # noqa: S108 - removed by mmdebstrap itself
        if tool("newuidmap", package="uidmap") and not _has_subordinate_ids():
            raise MissingToolError(
                "building Debian as an ordinary user needs subordinate ids",
                object="/etc/subuid",
                action="as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "
                "USER; or build as root",
            )
    said = ""

    def watch(line: str) -> None:
        nonlocal said
        said = line.removeprefix("I: ")
        for text, done in _STEPS.items():
            if said.startswith(text):
                progress(done, text)

    try:
        await run(
            [
                tool("mmdebstrap", package="mmdebstrap"),
                f"--mode={mode}",
                "--format=tar",
                "--variant=minbase",
                "--architectures=amd64",
                f"--include={','.join(_PACKAGES)}",
                *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
                f"--essential-hook={_hook('essential.sh')}",
                f"--customize-hook={_hook('customize.sh')}",
                suite,
                str(tarball),
                "-",
            ],
            stdin=sources.encode(),
            env={"TMPDIR": str(scratch), "SOURCE_DATE_EPOCH": ""},
            timeout=3600,
            on_line=watch,
        )
    except ProgramError as error:
        raise ProgramError(
            f"mmdebstrap could not build {suite}: {error.message}",
            object=f"debian {suite}",
            action="check the mirror and the free disk space; its last words are above",
        ) from error


def _has_subordinate_ids() -> bool:
    import pwd

    names = {str(os.geteuid()), pwd.getpwuid(os.geteuid()).pw_name}
    try:
        lines = Path("/etc/subuid").read_text().splitlines()
    except OSError:
        return False
    return any(line.partition(":")[0] in names for line in lines)


async def _make_root(tarball: Path, disk: Path, tmp: Path) -> None:
    """Unpacks the system and writes it into an ext4 file system inside the disk image."""
    tree = tmp / "tree"
    tree.mkdir()
    # One shell for both, so that fakeroot remembers the owners.
    script = (
        'tar -xpf "$1" -C "$2" --numeric-owner && exec mke2fs -q -F -t ext4 -L debian-root '
        '-m 1 -E "offset=$4,lazy_itable_init=0,lazy_journal_init=0" -d "$2" "$3" "$5k"'
    )
    command = [
        "sh", "-c", script, "sh", str(tarball), str(tree), str(disk),
        str(ROOT.start), str(root_size(_DISK_SIZE) // 1024),
    ]  # fmt: skip
    if os.geteuid() != 0:
        command = [tool("fakeroot", package="fakeroot"), "--", *command]
    await run(command, timeout=1800)
    await asyncio.to_thread(remove_tree, tree)


def _write_boot_files(tarball: Path, loaders: Path, target: Path, tmp: Path) -> tuple[bytes, bytes]:
    """The initrd for direct boot; returns GRUB's boot sector and core image."""
    unpacked = tmp / "boot"
    wanted = ("boot/vmlinuz-", "boot/grub/core.img", "usr/lib/grub/i386-pc/boot.img")
    modules = ("usr/lib/modules/", "lib/modules/")
    with tarfile.open(tarball) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if not name.startswith(wanted) and not (
                name.startswith(modules) and name.endswith((".ko", ".ko.xz"))
            ):
                continue
            content = archive.extractfile(member) if member.isreg() else None
            if content is None or ".." in name.split("/"):
                continue
            path = unpacked / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    write_boot_initrd(unpacked, loaders, target)
    return (
        (unpacked / "usr/lib/grub/i386-pc/boot.img").read_bytes(),
        (unpacked / "boot/grub/core.img").read_bytes(),
    )


def _esp_files(loaders: Path, tmp: Path) -> dict[str, Path]:
    """What is on the EFI system partition: the removable-media path, so that no boot entry in the
    firmware's variables is needed (UEFI 2.10, 3.5.1.1)."""
    shim = loaders / "usr/lib/shim/shimx64.efi.signed"
    grub = loaders / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"
    manager = loaders / "usr/lib/shim/mmx64.efi.signed"
    for path in (shim, grub, manager):
        if not path.is_file():
            raise UndercroftError(f"the boot loader packages hold no {path.name}")
    # Debian's signed GRUB looks for its settings here.
    settings = tmp / "grub.cfg"
    settings.write_text(
        "search.fs_label debian-root root\n"
        "set prefix=($root)/boot/grub\n"
        "configfile $prefix/grub.cfg\n"
    )
    return {
        "EFI/BOOT/BOOTX64.EFI": shim,
        "EFI/BOOT/grubx64.efi": grub,
        "EFI/BOOT/mmx64.efi": manager,
        "EFI/debian/grub.cfg": settings,
    }
