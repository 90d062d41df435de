"""Images: immutable, content-addressed starting points for VMs."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from undercroft.model.base import Model, Record, Spec


class ImageSourceKind(StrEnum):
    """Where an image comes from."""

    BUILD = "build"  # made here from packages; value: "tiny" or "debian:12"
    FILE = "file"  # a file on this host; value: its path
    URL = "url"  # fetched; value: the address
    CATALOGUE = "catalogue"  # a name in the catalogue file
    UPLOAD = "upload"  # sent through the API; value: the name it had


class DiskFormat(StrEnum):
    """Formats of disk images, always stated and never probed from untrusted content."""

    RAW = "raw"
    QCOW2 = "qcow2"
    VMDK = "vmdk"
    VPC = "vpc"
    VHDX = "vhdx"
    VDI = "vdi"


class ImageState(StrEnum):
    """Life of an image."""

    PENDING = "pending"
    READY = "ready"
    REMOVING = "removing"


class ImageFile(Model, frozen=True, kw_only=True):
    """One file of an image: its size in bytes and SHA-256 in hex."""

    size: int
    sha256: str


class ImageDefaults(Model, frozen=True, kw_only=True):
    """What a VM made from the image gets unless its user says otherwise. Memory in bytes."""

    cpus: int = 1
    memory: int = 512 << 20
    machine: str = "q35"
    firmware: str = "bios"  # bios | uefi | kernel (direct boot of the image's own kernel)
    user: str | None = None  # account that cloud-init creates, or that exists
    display: str | None = None  # none | std | virtio (None: what the machine has)


class ImageContent(Model, frozen=True, kw_only=True):
    """What is in an image: its manifest, and through its digest its identity.

    ``files`` maps names inside the image's directory to size and checksum; ``disk``, ``kernel`` and
    ``initrd`` name entries of it. ``virtual_size`` is the size of the disk as the guest sees it, in
    bytes (0 without a disk). ``kernel_arguments`` is the command line that direct boot needs.
    """

    arch: str = "x86_64"
    os: str = "unknown"  # for instance "debian 12"
    files: dict[str, ImageFile] = {}
    disk: str | None = None
    disk_format: DiskFormat = DiskFormat.QCOW2
    virtual_size: int = 0
    kernel: str | None = None
    initrd: str | None = None
    kernel_arguments: str = ""
    cloud_init: bool = False  # reads a NoCloud seed
    agent: bool = False  # runs qemu-guest-agent
    ssh: bool = False  # runs an SSH server
    ready_line: str | None = None  # printed on the serial console once userspace is up
    defaults: ImageDefaults = ImageDefaults()


class ImageSpec(Spec, frozen=True, kw_only=True):
    """What was asked for.

    ``sha256`` (hex) is what the source must have; ``format`` is stated by the user, or recognised
    by magic number where that is safe (never for raw).
    """

    source: ImageSourceKind
    value: str
    sha256: str | None = None
    format: DiskFormat | None = None
    firmware: str | None = None
    user: str | None = None


class ImageStatus(Model, frozen=True, kw_only=True):
    """What is there. ``digest`` (hex SHA-256 of the manifest) names the image's directory."""

    state: ImageState = ImageState.PENDING
    digest: str | None = None
    size: int = 0
    content: ImageContent | None = None
    message: str | None = None


class Image(Record, frozen=True, kw_only=True):
    """An image. ``tasks`` are the ids of those that wait or run, in their order."""

    kind: ClassVar[str] = "image"
    spec: ImageSpec
    status: ImageStatus = ImageStatus()
    tasks: tuple[str, ...] = ()
