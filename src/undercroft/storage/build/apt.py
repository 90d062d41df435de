"""A private apt: packages of a Debian suite, fetched and verified without touching the host's own.

Its lists, cache and package database live in a directory of ours, so it works as any user and for
any suite. apt itself checks the archive's signature and each package's checksum; nothing here
weakens that. What the host configured for the network (proxies, time-outs) still holds.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from undercroft.model.errors import FetchError, InvalidError, MissingToolError, ProgramError
from undercroft.storage.process import Progress, no_progress, run, tool

__all__ = ["SUITES", "Package", "PrivateApt", "Source", "find_sources"]

SUITES = {"11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"}
"""Debian's releases: version to code name."""

_KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
_FORMAT = "$(SITE)\t$(RELEASE)\t$(ORIGIN)\t$(LABEL)\t$(IDENTIFIER)"
_MIRROR = re.compile(r"(https?|file|mirror\+https?)://[^\s\[\]]+|/[^\s\[\]]+")


@dataclass(frozen=True)
class Source:
    """One archive: where it is, and which suite of it."""

    site: str
    suite: str

    def line(self, keyring: Path) -> str:
        """As a line of ``sources.list``."""
        return f"deb [signed-by={keyring}] {self.site} {self.suite} main"


@dataclass(frozen=True)
class Package:
    """A package that is to be fetched: its name, version, file name in the archive and bytes."""

    name: str
    version: str
    file: str
    size: int


def keyring() -> Path:
    """The file with the keys that sign Debian's archive.

    Raises:
        MissingToolError: it is not installed.
    """
    for path in _KEYRINGS:
        if path.is_file():
            return path
    raise MissingToolError(
        "the keys that sign Debian's packages are not installed",
        object="debian-archive-keyring",
        action="install the package debian-archive-keyring",
    )


async def find_sources(suite: str, mirror: str | None = None) -> tuple[Source, ...]:
    """The archives for a Debian suite (its code name), best known mirror first.

    A given ``mirror`` (a URL or a directory) is used as it is. Otherwise the mirror is the one
    from which this host's apt takes Debian, with its security archive if that is configured.

    Raises:
        InvalidError: the mirror is not a URL, or none was given and this host's apt knows none.
    """
    if mirror is not None:
        if _MIRROR.fullmatch(mirror) is None:
            raise InvalidError(f"{mirror[:200]!r} is not a mirror", action="give its http(s) URL")
        site = f"file://{mirror}" if mirror.startswith("/") else mirror
        return (Source(site.rstrip("/"), suite),)
    apt_get = tool("apt-get", package="apt")
    table = (await run([apt_get, "indextargets", "--format", _FORMAT], timeout=60)).decode()
    return choose_sources(table, suite)


def choose_sources(table: str, suite: str) -> tuple[Source, ...]:
    """The archives for ``suite``, from what ``apt-get indextargets`` printed in our format.

    Raises:
        InvalidError: the table has no Debian archive.
    """
    main: str | None = None
    security: str | None = None
    known = set(SUITES.values())
    for line in table.splitlines():
        site, release, origin, label, identifier = (*line.split("\t"), "", "", "", "")[:5]
        if identifier != "Packages":
            continue
        # Before the first `apt-get update` the origin is unknown: then the suite's name must do.
        if origin not in ("Debian", "") and not origin.startswith("$("):
            continue
        base = release.removesuffix("-security").removesuffix("-updates")
        if base not in known and base not in ("stable", "oldstable", "testing"):
            continue
        if label == "Debian-Security" or release.endswith("-security"):
            security = security or site
        elif main is None or release == suite:
            main = site
    if main is None:
        raise InvalidError(
            "this host's apt has no Debian archive to build from",
            object=f"suite {suite}",
            action="give one with --mirror URL",
        )
    sources = [Source(main, suite), Source(main, f"{suite}-updates")]
    if security is not None:
        sources.append(Source(security, f"{suite}-security"))
    return tuple(sources)


class PrivateApt:
    """apt with its own state under ``root``; call `update` first."""

    def __init__(self, root: Path, sources: tuple[Source, ...], architecture: str = "amd64"):
        self.root = root
        self.sources = sources
        self.architecture = architecture
        self._apt_get = tool("apt-get", package="apt")
        self._dpkg_deb = tool("dpkg-deb", package="dpkg")

    def write_configuration(self) -> None:
        """Lays out the directory; `update` does this by itself."""
        for name in ("state/lists/partial", "cache/archives/partial", "etc", "debs"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        keys = keyring()
        (self.root / "etc/sources.list").write_text(
            "".join(source.line(keys) + "\n" for source in self.sources)
        )
        # APT::Sandbox::User: apt's own user cannot enter our directory.
        (self.root / "apt.conf").write_text(
            f'Dir::Etc::sourcelist "{self.root}/etc/sources.list";\n'
            'Dir::Etc::sourceparts "/dev/null";\n'
            'Dir::Etc::preferences "/dev/null";\n'
            'Dir::Etc::preferencesparts "/dev/null";\n'
            f'Dir::State "{self.root}/state";\n'
            f'Dir::State::status "{self.root}/status";\n'
            f'Dir::Cache "{self.root}/cache";\n'
            f'APT::Architecture "{self.architecture}";\n'
            f'APT::Architectures {{ "{self.architecture}"; }};\n'
            'APT::Install-Recommends "false";\n'
            'APT::Sandbox::User "";\n'
            'Acquire::Languages "none";\n'
            'Acquire::Retries "3";\n'
            'Debug::NoLocking "true";\n'
        )

    async def _apt(self, *arguments: str, cwd: Path | None = None, timeout: float = 900) -> str:
        environment = {
            "APT_CONFIG": str(self.root / "apt.conf"),
            "DEBIAN_FRONTEND": "noninteractive",
        }
        try:
            output = await run(
                [self._apt_get, "-q", *arguments], cwd=cwd, env=environment, timeout=timeout
            )
        except ProgramError as error:
            raise FetchError(
                f"apt could not fetch from {self.sources[0].site}: {error.message}",
                object=f"suite {self.sources[0].suite}",
                action="check the mirror and the network, or give another with --mirror URL",
            ) from error
        return output.decode(errors="replace")

    async def update(self) -> None:
        """Fetches the package lists and checks their signature (about 9 MB, a few seconds).

        Raises:
            FetchError: an archive cannot be reached, or its signature is not valid.
        """
        await asyncio.to_thread(self.write_configuration)
        await self._apt("-o", "APT::Update::Error-Mode=any", "update")

    async def plan(self, *names: str) -> list[Package]:
        """The named packages and all that they depend on, as apt would install them.

        Raises:
            FetchError: there is no such package in the archive.
        """
        simulated = await self._apt(
            "install", "--yes", "--no-install-recommends", "--print-uris", "-qq", *names
        )
        return parse_uris(simulated)

    async def fetch(self, packages: list[Package], progress: Progress = no_progress) -> list[Path]:
        """Downloads packages and returns their files, verified by apt.

        Raises:
            FetchError: one could not be downloaded, or is not what the archive's list says.
        """
        directory = self.root / "debs"
        progress(0.0, "downloading packages")
        watcher = asyncio.create_task(
            _watch_growth(directory, sum(p.size for p in packages), progress)
        )
        try:
            await self._apt("download", *(f"{p.name}={p.version}" for p in packages), cwd=directory)
        finally:
            watcher.cancel()
        progress(1.0, "downloading packages")
        return [directory / package.file for package in packages]

    async def unpack(self, files: list[Path], target: Path) -> None:
        """Unpacks packages into a directory; their scripts are not run.

        Raises:
            ProgramError: a package cannot be unpacked.
        """
        for file in files:
            await run([self._dpkg_deb, "-x", str(file), str(target)], timeout=300)


async def _watch_growth(directory: Path, total: int, progress: Progress) -> None:
    """Reports how much has arrived; apt's own progress is not made for programs."""
    while total:
        await asyncio.sleep(0.2)
        arrived = await asyncio.to_thread(_bytes_below, directory)
        progress(arrived / total, "downloading packages")


def _bytes_below(directory: Path) -> int:
    total = 0
    for entry in os.scandir(directory):
        try:
            total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
    return total


_URI = re.compile(r"'[^']+' (?P<file>\S+) (?P<size>[0-9]+)(?: \S+)?")


def parse_uris(text: str) -> list[Package]:
    """What ``apt-get --print-uris`` printed (lines ``'URL' FILE SIZE HASH``)."""
    packages = []
    for line in text.splitlines():
        match = _URI.fullmatch(line.strip())
        if match is None or not match["file"].endswith(".deb"):
            continue
        name, version, _ = match["file"].rsplit("_", 2)
        packages.append(Package(name, unquote(version), match["file"], int(match["size"])))
    return packages
