"""What this host is: facts read from the system, for its record."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
from pathlib import Path

from undercroft import __version__
from undercroft.hypervisor.emulator import Emulator
from undercroft.model.host import AcceleratorStatus, HostStatus
from undercroft.storage.files import whole_space


async def describe(
    data: Path,
    emulator: Emulator | None,
    architectures: tuple[str, ...],
    accelerators: tuple[AcceleratorStatus, ...],
    firmware: tuple[str, ...],
    started: float,
) -> HostStatus:
    """The host's status as of now."""
    return await asyncio.to_thread(
        _describe, data, emulator, architectures, accelerators, firmware, started
    )


def _describe(
    data: Path,
    emulator: Emulator | None,
    architectures: tuple[str, ...],
    accelerators: tuple[AcceleratorStatus, ...],
    firmware: tuple[str, ...],
    started: float,
) -> HostStatus:
    capacity, free = whole_space(data)
    problems = []
    if emulator is None:
        problems.append("QEMU is not installed: no VM can start (script/setup installs it)")
    if not any(a.available and a.name == "kvm" for a in accelerators):
        problems.append("KVM does not work here, so guests run by emulation (TCG), much slower")
    if free < 1 << 30:
        problems.append(f"only {free >> 20}M are free below {data}")
    return HostStatus(
        version=__version__,
        hostname=socket.gethostname(),
        os=_os_name(),
        kernel=platform.release(),
        cpu_model=_cpu_model(),
        cpus=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        data=str(data),
        disk_total=capacity,
        disk_free=free,
        qemu=emulator.version_text if emulator is not None else None,
        architectures=architectures,
        accelerators=accelerators,
        firmware=firmware,
        cgroup=_cgroup(),
        privileged=os.geteuid() == 0,
        started=started,
        problems=tuple(problems),
    )


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return platform.system()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _cgroup() -> str:
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return "v2"
    return "v1" if Path("/sys/fs/cgroup/memory").exists() else "none"
