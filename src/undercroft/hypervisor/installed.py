"""Which QEMU system emulators are installed, found by looking for them; versions asked once."""

from __future__ import annotations

import os
import re
from pathlib import Path

from undercroft.hypervisor import probe_cache
from undercroft.hypervisor.emulator import OLDEST_QEMU, Emulator, read_version
from undercroft.model.errors import UndercroftError

__all__ = ["CACHE_FILE", "installed_architectures", "installed_emulators", "known_version"]

CACHE_FILE = "qemu-versions.json"
_PROGRAM = re.compile(r"qemu-system-([a-z0-9_]+)")


def installed_architectures(search: str | None = None) -> dict[str, str]:
    """The guest architectures in QEMU's own names (``x86_64``, ``aarch64``) and the program for
    each, in alphabetical order.

    ``search`` is a PATH (None: that of the environment); what comes first in it wins. Aliases of
    distributions (``qemu-system-arm64`` in Debian) count as what they lead to.
    """
    found: dict[str, str] = {}
    for directory in (os.environ.get("PATH", "") if search is None else search).split(os.pathsep):
        try:
            names = sorted(os.listdir(directory)) if directory else []
        except OSError:
            continue
        for name in names:
            if not _PROGRAM.fullmatch(name):
                continue
            path = os.path.realpath(os.path.join(directory, name))
            program = _PROGRAM.fullmatch(os.path.basename(path)) or _PROGRAM.fullmatch(name)
            if program is not None and os.path.isfile(path) and os.access(path, os.X_OK):
                found.setdefault(program[1], path)
    return dict(sorted(found.items()))


async def known_version(path: str, cache: Path) -> tuple[int, int, int]:
    """The version of a QEMU program, asked again only when another file stands there.

    ``cache`` is the directory of `CACHE_FILE`.

    Raises:
        MissingToolError, TimeLimitError, UnsupportedError: as `read_version`.
    """
    identity = probe_cache.file_identity(path)
    known = await _load(cache)
    if identity and identity in known:
        return known[identity]
    version = await read_version(path)
    if identity:
        # Others may have been added while this one was asked; those that are gone are dropped.
        known = {key: value for key, value in (await _load(cache)).items() if _stands(key)}
        await probe_cache.save(cache / CACHE_FILE, {**known, identity: version})
    return version


async def installed_emulators(cache: Path, search: str | None = None) -> tuple[Emulator, ...]:
    """The emulators that Undercroft can use, by architecture.

    Those that are too old, or do not even tell their version, are left out.
    """
    emulators = []
    for arch, path in installed_architectures(search).items():
        try:
            version = await known_version(path, cache)
        except UndercroftError:
            continue
        if version >= OLDEST_QEMU:
            emulators.append(Emulator(arch=arch, path=path, version=version))
    return tuple(emulators)


async def _load(cache: Path) -> dict[str, tuple[int, int, int]]:
    return await probe_cache.load(cache / CACHE_FILE, dict[str, tuple[int, int, int]]) or {}


def _stands(identity: str) -> bool:
    return probe_cache.file_identity(identity.rsplit(" ", 3)[0]) == identity
