"""The virtual TPM."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.line import HandleKind, Line

__all__ = ["Tpm"]


@dataclass(frozen=True)
class Tpm:
    """A TPM 2.0 whose work is done by swtpm at the other end of a socket pair."""

    def add_to(self, line: Line) -> None:
        """Adds the device."""
        descriptor = line.handle("tpm", HandleKind.TPM, "")
        line.option("-chardev", "socket", id="tpm", fd=descriptor)
        line.add("-tpmdev", "emulator,id=tpm0,chardev=tpm")
        line.device("tpm-crb" if line.x86 else "tpm-tis-device", id="tpm0-dev", tpmdev="tpm0")
