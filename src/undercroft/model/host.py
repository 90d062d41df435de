"""Hosts: machines that run VMs."""

from __future__ import annotations

from typing import ClassVar

from undercroft.model.base import Model, Record, Spec


class AcceleratorStatus(Model, frozen=True, kw_only=True):
    """One way to run guests; ``reason`` says why it can or cannot be used."""

    name: str
    available: bool
    reason: str


class HostSpec(Spec, frozen=True, kw_only=True):
    """What an administrator decides about a host; ``uid_base`` is the first of the unprivileged
    user ids that its QEMU processes run as (None: as the daemon's own user)."""

    uid_base: int | None = None


class HostStatus(Model, frozen=True, kw_only=True):
    """What a host is. Sizes in bytes, times in seconds since 1970."""

    version: str = ""
    hostname: str = ""
    os: str = ""
    kernel: str = ""
    cpu_model: str = ""
    cpus: int = 0
    memory: int = 0
    data: str = ""
    disk_total: int = 0
    disk_free: int = 0
    qemu: str | None = None
    architectures: tuple[str, ...] = ()
    accelerators: tuple[AcceleratorStatus, ...] = ()
    firmware: tuple[str, ...] = ()  # of bios, uefi, uefi-secure, tpm
    cgroup: str = "none"  # v1 | v2 | none
    privileged: bool = False
    started: float = 0.0
    problems: tuple[str, ...] = ()


class Host(Record, frozen=True, kw_only=True):
    """A host."""

    kind: ClassVar[str] = "host"
    spec: HostSpec = HostSpec()
    status: HostStatus = HostStatus()
