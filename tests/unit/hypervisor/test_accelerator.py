"""The words in which a probe reports, and how its answer is chosen and kept."""

import errno
import os
from pathlib import Path

import pytest

from undercroft.hypervisor.accelerator import (
    Acceleration,
    AcceleratorReport,
    explain_device,
    explain_run,
)
from undercroft.hypervisor.accelerator_guest import STAGES, GuestRun, Outcome
from undercroft.model.host import AcceleratorStatus


def acceleration(*, kvm: bool, tcg: bool = True) -> Acceleration:
    def report(name: str, works: bool) -> AcceleratorReport:
        assert name in ("kvm", "tcg")
        return AcceleratorReport(
            name="kvm" if name == "kvm" else "tcg",
            available=works,
            reason=f"about {name}",
            code="works" if works else "hung",
        )

    return Acceleration(
        kvm=report("kvm", kvm),
        tcg=report("tcg", tcg),
        qemu="/usr/bin/qemu-system-x86_64",
        qemu_version=(10, 0, 2),
        probed=1.0,
        duration=0.5,
    )


def test_kvm_is_chosen_only_where_it_works() -> None:
    assert acceleration(kvm=True).best.name == "kvm"
    assert acceleration(kvm=False).best.name == "tcg"
    nothing = acceleration(kvm=False, tcg=False).best
    assert (nothing.name, nothing.available) == ("tcg", False)


def test_statuses_begin_with_the_best() -> None:
    kvm = AcceleratorStatus(name="kvm", available=True, reason="about kvm")
    tcg = AcceleratorStatus(name="tcg", available=True, reason="about tcg")
    assert acceleration(kvm=True).statuses == (kvm, tcg)
    no_kvm = AcceleratorStatus(name="kvm", available=False, reason="about kvm")
    assert acceleration(kvm=False).statuses == (tcg, no_kvm)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (GuestRun(outcome=Outcome.PASSED, seconds=0.03), "a 64-bit guest ran in it (0.03 s)"),
        (
            GuestRun(outcome=Outcome.INTERNAL_ERROR, stages="RPLM", message="emulation failure"),
            "a 64-bit guest cannot run in it: it gave up at SSE arithmetic: emulation failure"
            " (kernel modules: kvm, kvm_pvm)",
        ),
        (
            GuestRun(outcome=Outcome.HUNG, stages="RP"),
            "a 64-bit guest cannot run in it: it hung for 3 s at long mode with paging"
            " (kernel modules: kvm, kvm_pvm)",
        ),
        (
            GuestRun(outcome=Outcome.HUNG, stages="".join(STAGES)[:-1]),
            "a 64-bit guest cannot run in it: it is so slow that its instructions must be"
            " interpreted one by one (kernel modules: kvm, kvm_pvm)",
        ),
        (
            GuestRun(outcome=Outcome.FAILED, exit_code=-6, message="error: failed to set MSR"),
            "QEMU died of signal 6: error: failed to set MSR",
        ),
        (
            GuestRun(outcome=Outcome.FAILED, exit_code=1, message="invalid accelerator kvm"),
            "QEMU failed with exit code 1: invalid accelerator kvm",
        ),
        (
            GuestRun(outcome=Outcome.NOT_STARTED, message="No such file or directory"),
            "QEMU could not be started: No such file or directory",
        ),
    ],
)
def test_reasons(run: GuestRun, words: str) -> None:
    assert explain_run("kvm", run, ("kvm", "kvm_pvm")) == words


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_words(outcome: Outcome) -> None:
    for stages in ("", "RPL", "".join(STAGES)):
        assert explain_run("tcg", GuestRun(outcome=outcome, stages=stages)).strip()


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
def test_no_device(tmp_path: Path, error: int) -> None:
    code, words = explain_device(tmp_path / "kvm", error)
    assert code == "no-device"
    assert words.startswith(f"there is no {tmp_path}/kvm: ")


def test_no_permission_says_which_group(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o600)
    code, words = explain_device(device, errno.EACCES)
    assert code == "no-permission"
    assert "by root only (mode 0600" in words

    device.chmod(0o660)
    if os.geteuid() == 0:
        strange = max(os.getgroups(), default=0) + 54321
        os.chown(device, 0, strange)
        _, words = explain_device(device, errno.EACCES)
        assert f"for the group gid {strange}, which root is not in" in words
        assert f"usermod -aG gid {strange}" in words


def test_no_permission_in_a_directory_that_is_closed(tmp_path: Path) -> None:
    code, words = explain_device(tmp_path / "gone", errno.EACCES)
    assert (code, words) == (
        "no-permission",
        f"{tmp_path}/gone may not be opened: No such file or directory",
    )


def test_other_errors_are_told(tmp_path: Path) -> None:
    code, words = explain_device(tmp_path / "kvm", errno.EMFILE)
    assert (code, words) == ("device-error", f"{tmp_path}/kvm does not open: Too many open files")
