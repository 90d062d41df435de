"""Which QEMU programs there are, and what they can do."""

from __future__ import annotations

import asyncio
import os
import re
import shutil

from undercroft.model.base import Model
from undercroft.model.errors import MissingToolError, TimeLimitError, UnsupportedError

__all__ = ["OLDEST_QEMU", "Emulator", "find_emulator", "parse_version", "read_version"]

OLDEST_QEMU = (7, 2, 0)
_VERSION_TIMEOUT = 20.0

_PACKAGES = {
    "x86_64": "qemu-system-x86",
    "i386": "qemu-system-x86",
    "aarch64": "qemu-system-arm",
    "arm": "qemu-system-arm",
    "riscv64": "qemu-system-misc",
    "ppc64": "qemu-system-ppc",
}


class Emulator(Model, frozen=True, kw_only=True):
    """A QEMU system emulator: for which guests, where, and its version (major, minor, micro)."""

    arch: str
    path: str
    version: tuple[int, int, int]

    @property
    def version_text(self) -> str:
        """As people write it: ``10.0.2``."""
        return ".".join(map(str, self.version))


def parse_version(text: str) -> tuple[int, int, int]:
    """The version in what ``qemu-system-… --version`` prints.

    Raises:
        UnsupportedError: none is in there.
    """
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise UnsupportedError(f"cannot tell the version of QEMU from {text[:80]!r}")
    return int(match[1]), int(match[2]), int(match[3] or 0)


async def find_emulator(arch: str) -> Emulator:
    """Finds the emulator for guests of an architecture and asks its version (about 30 ms: keep
    the answer).

    Raises:
        MissingToolError: it is not installed.
        UnsupportedError: it is older than `OLDEST_QEMU`.
    """
    program = f"qemu-system-{arch}"
    path = shutil.which(program)
    if path is None:
        package = _PACKAGES.get(arch, "qemu-system")
        raise MissingToolError(
            f"{program} is not installed, so {arch} guests cannot run",
            action=f"install the package {package}",
        )
    version = await read_version(path)
    if version < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU[:2]))
        raise UnsupportedError(
            f"{path} is version {'.'.join(map(str, version))}; Undercroft needs {oldest} or newer",
            action="install a newer QEMU",
        )
    return Emulator(arch=arch, path=os.path.realpath(path), version=version)


async def read_version(path: str) -> tuple[int, int, int]:
    """Asks a QEMU program its version.

    Raises:
        MissingToolError: there is no such program.
        TimeLimitError: it does not answer.
        UnsupportedError: its answer holds no version.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            path,
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise MissingToolError(f"{path} cannot be started: {error.strerror}") from error
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _VERSION_TIMEOUT)
    except TimeoutError as error:
        raise TimeLimitError(f"{path} --version did not answer") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return parse_version(output.decode(errors="replace"))
