"""Which accelerators run guests on this host, and if not, why not.

A host can offer a /dev/kvm that opens, answers and even runs code, and yet cannot run an ordinary
64-bit kernel (a KVM that interprets, as software-only ones do; nested virtualization gone wrong).
So KVM is used only if a guest has really run in it: accelerator_guest.s, which goes through what a
kernel does, within a time limit. The same guest must pass under TCG, so that a failure speaks of
the accelerator. The answer is kept until something it depends on changes (reboot, QEMU, device).
"""

from __future__ import annotations

import asyncio
import errno
import grp
import os
import platform
import pwd
import re
import stat
import time
from pathlib import Path
from typing import Literal

from undercroft.hypervisor import probe_cache
from undercroft.hypervisor.accelerator_guest import (
    STAGES,
    GuestRun,
    Outcome,
    guest_digest,
    run_guest,
)
from undercroft.hypervisor.emulator import Emulator
from undercroft.model.base import Model
from undercroft.model.host import AcceleratorStatus

__all__ = [
    "CACHE_FILE",
    "KVM_DEVICE",
    "Acceleration",
    "AcceleratorReport",
    "explain_device",
    "explain_run",
    "probe",
]

KVM_DEVICE = Path("/dev/kvm")
CACHE_FILE = "accelerator.json"
RUN_LIMIT = 3.0  # seconds for KVM; a working one needs well under a tenth of one
TCG_RUN_LIMIT = 30.0  # TCG is slow where it runs inside an emulated machine
DOUBTFUL_FOR = 3600.0  # seconds; other answers hold until what they depend on changes
_ATTEMPTS = 2  # a busy host may let one run time out


class AcceleratorReport(Model, frozen=True, kw_only=True):
    """One accelerator.

    ``reason`` says in words why it can or cannot be used; ``code`` is stable: ``works``,
    ``no-device``, ``no-permission``, ``device-error``, ``foreign-host``, or an `Outcome` of the
    guest other than ``passed``. ``stages`` are the guest's stages passed (`STAGES`), ``seconds``
    how long the guest ran.
    """

    name: Literal["kvm", "tcg"]
    available: bool
    reason: str
    code: str
    stages: str = ""
    seconds: float = 0.0


class Acceleration(Model, frozen=True, kw_only=True):
    """What this host and this QEMU offer. ``probed`` is in seconds since 1970, ``duration`` in
    seconds; ``cached``: the answer is from an earlier probe."""

    kvm: AcceleratorReport
    tcg: AcceleratorReport
    qemu: str
    qemu_version: tuple[int, int, int]
    probed: float
    duration: float
    cached: bool = False

    @property
    def best(self) -> AcceleratorReport:
        """KVM where it truly works, else TCG (whose ``available`` may be false too)."""
        return self.kvm if self.kvm.available else self.tcg

    @property
    def statuses(self) -> tuple[AcceleratorStatus, ...]:
        """For `HostStatus.accelerators`, the best first."""
        both = (self.kvm, self.tcg) if self.kvm.available else (self.tcg, self.kvm)
        return tuple(
            AcceleratorStatus(name=one.name, available=one.available, reason=one.reason)
            for one in both
        )


class _Conditions(Model, frozen=True, kw_only=True):
    """What an answer depends on."""

    boot: str
    kernel: str
    cpu: str
    qemu: str
    device: str
    modules: tuple[str, ...]
    guest: str
    uid: int


class _Kept(Model, frozen=True, kw_only=True):
    conditions: _Conditions
    acceleration: Acceleration


async def probe(
    emulator: Emulator, cache: Path, *, force: bool = False, device: Path = KVM_DEVICE
) -> Acceleration:
    """Finds out which accelerators work with an x86-64 QEMU.

    Takes about half a second; up to some ten seconds where guests hang; a few milliseconds when the
    answer is known. ``cache`` is the directory of `CACHE_FILE`; ``force`` probes again. Raises
    nothing: what goes wrong is in the reports.
    """
    path = cache / CACHE_FILE
    opened = _open_device(device)
    try:
        conditions = await asyncio.to_thread(_conditions, emulator, device, opened)
        kept = None if force else await probe_cache.load(path, _Kept)
        if kept is not None and kept.conditions == conditions and _still_good(kept.acceleration):
            return _as_cached(kept.acceleration)
        began = time.monotonic()
        kvm = await _probe_kvm(emulator, device, opened)
        tcg = _report("tcg", await run_guest(emulator, "tcg", run_limit=TCG_RUN_LIMIT))
    finally:
        if opened.descriptor is not None:
            os.close(opened.descriptor)
    acceleration = Acceleration(
        kvm=kvm,
        tcg=tcg,
        qemu=emulator.path,
        qemu_version=emulator.version,
        probed=time.time(),
        duration=time.monotonic() - began,
    )
    await probe_cache.save(path, _Kept(conditions=conditions, acceleration=acceleration))
    return acceleration


def _still_good(found: Acceleration) -> bool:
    """A host that was too busy, or out of memory, gets another chance."""
    doubtful = {Outcome.HUNG, Outcome.SILENT, Outcome.FAILED, Outcome.NOT_STARTED}
    if found.kvm.code not in doubtful and found.tcg.code not in doubtful:
        return True
    return 0 <= time.time() - found.probed < DOUBTFUL_FOR


def _as_cached(found: Acceleration) -> Acceleration:
    return Acceleration(
        kvm=found.kvm,
        tcg=found.tcg,
        qemu=found.qemu,
        qemu_version=found.qemu_version,
        probed=found.probed,
        duration=found.duration,
        cached=True,
    )


async def _probe_kvm(emulator: Emulator, device: Path, opened: _Opened) -> AcceleratorReport:
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return AcceleratorReport(
            name="kvm",
            available=False,
            reason=f"KVM cannot run x86-64 guests on this {machine} host",
            code="foreign-host",
        )
    if opened.descriptor is None:
        code, reason = await asyncio.to_thread(explain_device, device, opened.error)
        return AcceleratorReport(name="kvm", available=False, reason=reason, code=code)
    run = GuestRun(outcome=Outcome.SILENT)
    for _ in range(_ATTEMPTS):
        run = await run_guest(emulator, "kvm", device=opened.descriptor, run_limit=RUN_LIMIT)
        if run.outcome not in (Outcome.HUNG, Outcome.SILENT):
            break
    return _report("kvm", run)


def _report(name: Literal["kvm", "tcg"], run: GuestRun) -> AcceleratorReport:
    passed = run.outcome is Outcome.PASSED
    return AcceleratorReport(
        name=name,
        available=passed,
        reason=explain_run(name, run, _kvm_modules() if name == "kvm" else ()),
        code="works" if passed else run.outcome.value,
        stages=run.stages,
        seconds=run.seconds,
    )


# --- the device


class _Opened(Model, frozen=True, kw_only=True):
    """An attempt to open the device: the descriptor, or the errno."""

    descriptor: int | None = None
    error: int = 0


def _open_device(device: Path) -> _Opened:
    try:
        return _Opened(descriptor=os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return _Opened(error=error.errno or errno.EIO)


def explain_device(device: Path, error: int) -> tuple[str, str]:
    """Code and words for a device that did not open, by errno."""
    if error in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return "no-device", f"there is no {device}: {_why_no_device()}"
    if error in (errno.EACCES, errno.EPERM):
        return "no-permission", _why_no_permission(device)
    return "device-error", f"{device} does not open: {os.strerror(error)}"


def _why_no_device() -> str:
    flags = set(_cpuinfo("flags").split())
    needed = "kvm_intel" if "vmx" in flags else "kvm_amd" if "svm" in flags else None
    if needed is not None and needed in _kvm_modules():
        return f"the module {needed} is loaded, but the device is missing (in a container?)"
    if needed is not None:
        return f"the kernel module {needed} is not loaded (as root: modprobe {needed})"
    if "hypervisor" in flags:
        return (
            "this machine is itself a VM, and its hypervisor offers no nested virtualization "
            "(switch it on there)"
        )
    return "the CPU offers no VT-x or AMD-V (it may be switched off in the firmware setup)"


def _why_no_permission(device: Path) -> str:
    user = _user_name(os.geteuid())
    try:
        found = device.stat()
    except OSError as error:
        return f"{device} may not be opened: {error.strerror}"
    group = _group_name(found.st_gid)
    mode = stat.S_IMODE(found.st_mode)
    allowed = mode & 0o060 == 0o060
    if allowed and found.st_gid not in {os.getegid(), *os.getgroups()} and found.st_gid != 0:
        return (
            f"{device} is for the group {group}, which {user} is not in "
            f"(as root: usermod -aG {group} {user}; then log in again)"
        )
    if allowed and found.st_gid != 0:
        return f"{device} may not be opened, although {user} is in its group {group} (a sandbox?)"
    return (
        f"{device} may be opened by root only (mode {mode:04o}, group {group}; usual is 0660, kvm)"
    )


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"


# --- words


def explain_run(name: str, run: GuestRun, modules: tuple[str, ...] = ()) -> str:
    """Why ``name`` can or cannot be used, from a run of the guest; ``modules`` are KVM's."""
    if run.outcome is Outcome.PASSED:
        return f"a 64-bit guest ran in it ({run.seconds:.2g} s)"
    said = f": {run.message}" if run.message else ""
    if run.outcome is Outcome.NOT_STARTED:
        return f"QEMU could not be started{said}"
    if run.outcome is Outcome.FAILED and run.exit_code is not None and run.exit_code < 0:
        return f"QEMU died of signal {-run.exit_code}{_where(run)}{said}"
    if run.outcome is Outcome.FAILED:
        return f"QEMU failed with exit code {run.exit_code}{_where(run)}{said}"
    how = {
        Outcome.INTERNAL_ERROR: "it gave up",
        Outcome.HUNG: f"it hung for {RUN_LIMIT if name == 'kvm' else TCG_RUN_LIMIT:g} s",
        Outcome.SILENT: "it never began",
        Outcome.EXCEPTION: "it met an exception that nothing had caused",
        Outcome.WRONG: "it got a wrong result",
        Outcome.RESET: "its processor reset itself",
    }[run.outcome]
    where = _where(run)
    if run.outcome is Outcome.HUNG and run.stages == "".join(STAGES)[:-1]:
        how, where = "it is so slow that its instructions must be interpreted one by one", ""
    by = f" (kernel modules: {', '.join(modules)})" if modules else ""
    return f"a 64-bit guest cannot run in it: {how}{where}{said}{by}"


def _where(run: GuestRun) -> str:
    if not run.stages:
        return ""
    left = [words for letter, words in STAGES.items() if letter not in run.stages]
    return f" at {left[0]}" if left else " at its very end"


# --- what the answer depends on


def _conditions(emulator: Emulator, device: Path, opened: _Opened) -> _Conditions:
    kernel = os.uname()
    return _Conditions(
        boot=_line(Path("/proc/sys/kernel/random/boot_id")),
        kernel=f"{kernel.release} {kernel.version}",
        cpu=f"{_cpuinfo('model name')} {_cpuinfo('flags')}",
        qemu=f"{probe_cache.file_identity(emulator.path)} {emulator.version}",
        device=_device_state(device, opened),
        modules=_kvm_modules(),
        guest=guest_digest(),
        uid=os.geteuid(),
    )


def _device_state(device: Path, opened: _Opened) -> str:
    try:
        found = device.stat()
    except OSError as error:
        return f"{device}: {error.errno}"
    return (
        f"{device} {found.st_rdev} {found.st_mode:o} {found.st_uid}:{found.st_gid} {opened.error}"
    )


def _kvm_modules() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in Path("/sys/module").glob("kvm*")))


def _cpuinfo(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""
    match = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1] if match else ""


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
