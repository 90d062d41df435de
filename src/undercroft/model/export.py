"""Exports: VMs and disks as files for other systems, kept until they have been fetched."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from undercroft.model.base import Model, Record, Spec


class ExportFormat(StrEnum):
    """What a VM, or one disk of it, is written as."""

    OVA = "ova"  # the whole VM in one file
    OVF = "ovf"  # the same in several
    RAW = "raw"
    QCOW2 = "qcow2"
    VMDK = "vmdk"
    VHD = "vhd"
    VHDX = "vhdx"
    VDI = "vdi"

    @property
    def whole(self) -> bool:
        """Whether it holds all of a VM, and not one disk."""
        return self in (ExportFormat.OVA, ExportFormat.OVF)


class VmdkKind(StrEnum):
    """The kinds of VMDK."""

    STREAM = "streamOptimized"  # compressed: what VMware imports
    SPARSE = "monolithicSparse"  # grows as it is written to: VMware Workstation, VirtualBox
    FLAT = "monolithicFlat"  # a descriptor, and the bare content beside it


class ExportState(StrEnum):
    """Life of an export."""

    PENDING = "pending"
    READY = "ready"


class ExportSpec(Spec, frozen=True, kw_only=True):
    """What was asked for. ``source`` is how the VM, snapshot or template is called; ``template``
    the id of the passing template that holds its disks until they are written; ``disk``: which one
    (0 is the first), of formats for one; ``file``: what its file is called, without its suffix;
    ``checksums``: whether its files are to have some."""

    source: str
    template: str
    format: ExportFormat = ExportFormat.OVA
    vmdk: VmdkKind = VmdkKind.STREAM
    disk: int = 0
    file: str
    checksums: bool = True
    host: str


class ExportFile(Model, frozen=True, kw_only=True):
    """A file: its size in bytes and SHA-256 in hex (empty: none was wanted); ``path``: where it is
    on the daemon's host."""

    name: str
    size: int
    sha256: str
    path: str


class ExportStatus(Model, frozen=True, kw_only=True):
    """What there is. ``notes``: what of the VM is not in it."""

    state: ExportState = ExportState.PENDING
    files: tuple[ExportFile, ...] = ()
    finished: float | None = None
    notes: tuple[str, ...] = ()


class Export(Record, frozen=True, kw_only=True):
    """An export. Its name is its id."""

    kind: ClassVar[str] = "export"
    spec: ExportSpec
    status: ExportStatus = ExportStatus()
    tasks: tuple[str, ...] = ()
