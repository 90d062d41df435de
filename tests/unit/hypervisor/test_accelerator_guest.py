"""The probe guest as it is committed, and how its runs are judged."""

import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.hypervisor.accelerator_guest import (
    STAGES,
    Outcome,
    firmware,
    guest_digest,
    judge,
    kvm_options,
    last_words,
    passed_stages,
)
from undercroft.hypervisor.emulator import Emulator

GUEST = files("undercroft.hypervisor")
SOURCE = GUEST.joinpath("accelerator_guest.s").read_text()
ALL = "".join(STAGES)
TOKEN = ALL + "=undercroft-guest-ok\n"


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("ld")), reason="needs binutils")
def test_the_bytes_are_those_of_the_source(tmp_path: Path) -> None:
    source, guest, binary = tmp_path / "guest.s", tmp_path / "guest.o", tmp_path / "guest.bin"
    source.write_text(SOURCE)
    subprocess.run(["as", "--64", "-o", guest, source], check=True)
    link = ["ld", "-m", "elf_x86_64", "-Ttext=0x10000", "-e", "start", "--oformat", "binary"]
    subprocess.run([*link, "-o", binary, guest], check=True)
    assert binary.read_bytes() == GUEST.joinpath("accelerator_guest.bin").read_bytes()


def test_the_guest_reports_the_stages_in_order() -> None:
    assert re.findall(r"^ +stage '([A-Z])'", SOURCE, re.MULTILINE) == list(STAGES)


def test_firmware_begins_at_the_reset_vector() -> None:
    rom = firmware()
    assert len(rom) == 65536
    assert rom[0xFFF0:0xFFF5] == bytes([0xEA, 0, 0, 0, 0xF0])  # jmp far F000:0000
    assert rom.startswith(GUEST.joinpath("accelerator_guest.bin").read_bytes())
    assert firmware(b"\xf4")[:2] == b"\xf4\0"
    with pytest.raises(ValueError, match="reset vector"):
        firmware(b"\x90" * 0xFFF1)


def test_digest_is_of_the_guest() -> None:
    assert re.fullmatch("[0-9a-f]{64}", guest_digest())


@pytest.mark.parametrize(
    ("output", "exit_code", "outcome"),
    [
        (TOKEN, 85, Outcome.PASSED),
        (TOKEN, 0, Outcome.RESET),
        (TOKEN, 1, Outcome.FAILED),
        (TOKEN, -6, Outcome.FAILED),
        (TOKEN + "x", 85, Outcome.WRONG),
        (TOKEN.replace("F", ""), 85, Outcome.WRONG),
        ("RPL", 85, Outcome.WRONG),
        ("", 85, Outcome.WRONG),
        ("RPLMS?", 45, Outcome.WRONG),
        ("RPLMSF!06", 43, Outcome.EXCEPTION),
        ("RPLMSF", 43, Outcome.FAILED),
        ("RPL", 0, Outcome.RESET),
        ("", 1, Outcome.FAILED),
    ],
)
def test_only_the_right_words_with_the_right_exit_code_pass(
    output: str, exit_code: int, outcome: Outcome
) -> None:
    assert judge(output, exit_code) is outcome


@given(st.text(alphabet=[*ALL, "!", "?"], max_size=12))
def test_passed_stages_are_a_gapless_beginning(output: str) -> None:
    stages = passed_stages(output)
    assert ALL.startswith(stages)
    assert output.startswith(stages)
    assert stages == ALL or not output.startswith(ALL[: len(stages) + 1])


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ("", ""),
        (" \n\n", ""),
        ("one\nlast line\n\n", "last line"),
        (
            "KVM internal error. Suberror: 1\nextra data[0]: 0x1\nemulation failure\nRAX=0\n",
            "KVM internal error. Suberror: 1; emulation failure",
        ),
        ("KVM: entry failed, hardware error 0x7\nEAX=0\n", "KVM: entry failed, hardware error 0x7"),
        (
            "qemu: warning: x\nqemu: error: failed to set MSR 0x10a to 0x0\n"
            "qemu: ../kvm.c:3: kvm_buf_set_msrs: Assertion `ret == n' failed.\n",
            "qemu: error: failed to set MSR 0x10a to 0x0",
        ),
    ],
)
def test_last_words(errors: str, words: str) -> None:
    assert last_words(errors) == words


def test_last_words_are_bounded() -> None:
    assert len(last_words("x" * 10_000)) == 300


def test_only_a_qemu_that_can_take_the_device_gets_it() -> None:
    def qemu(*version: int) -> Emulator:
        major, minor, micro = version
        return Emulator(arch="x86_64", path="/q", version=(major, minor, micro))

    assert kvm_options(qemu(10, 0, 2), 7) == [
        *("-add-fd", "fd=7,set=1"),
        *("-accel", "kvm,device=/dev/fdset/1"),
    ]
    assert kvm_options(qemu(8, 2, 9), 7) == ["-accel", "kvm"]
    assert kvm_options(qemu(10, 0, 2), None) == ["-accel", "kvm"]
