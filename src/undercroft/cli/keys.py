"""SSH keys of the person at the keyboard: theirs where they have some, else one of croft's own."""

from __future__ import annotations

import os
import re
import subprocess

from undercroft.cli.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from undercroft.cli.context import Croft

_USUAL = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")
_PUBLIC = re.compile(r"[a-z0-9@.-]{3,64} [A-Za-z0-9+/=]{16,}(?: [^\x00-\x1f\x7f]*)?")
_PRIVATE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")


def home(environ: Mapping[str, str]) -> str:
    """The user's home directory."""
    return environ.get("HOME") or os.path.expanduser("~")


def own_key(environ: Mapping[str, str]) -> str:
    """Where croft's own private key lies, if it was ever needed."""
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(home(environ), ".config")
    return os.path.join(base, "undercroft", "id_ed25519")


def known_hosts(environ: Mapping[str, str]) -> str:
    """Where host keys of VMs are remembered: apart from the user's ``~/.ssh/known_hosts``."""
    base = environ.get("XDG_STATE_HOME") or os.path.join(home(environ), ".local", "state")
    return os.path.join(base, "undercroft", "known_hosts")


def only_own_key(environ: Mapping[str, str]) -> str | None:
    """Croft's own private key, if the user has no other: ssh has to be told of it."""
    ssh = os.path.join(home(environ), ".ssh")
    if any(os.path.exists(os.path.join(ssh, name)) for name in _USUAL):
        return None
    own = own_key(environ)
    return own if os.path.exists(own) else None


def read_key(text: str) -> list[str]:
    """Public keys from a file (of a pair either half will do), or given as such.

    Raises:
        UsageError: no public key is there.
    """
    if _PUBLIC.fullmatch(text.strip()):
        return [text.strip()]
    path = os.path.expanduser(text)
    if not os.path.exists(path):
        raise UsageError(f"{text}: no such file", "give an SSH public key, or the file it is in")
    with open(path, encoding="utf-8", errors="replace") as file:
        content = file.read(65536)
    if _PRIVATE.search(content):
        if not os.path.exists(path + ".pub"):
            raise UsageError(
                f"{text} is a private key, and {path}.pub does not exist",
                f"make it: ssh-keygen -y -f {text} > {text}.pub",
            )
        return read_key(path + ".pub")
    keys = [line.strip() for line in content.splitlines() if _PUBLIC.fullmatch(line.strip())]
    if not keys:
        raise UsageError(f"{text} holds no SSH public key", "such a file mostly ends in .pub")
    return keys


def default_keys(croft: Croft) -> list[str]:
    """The public keys that a new VM is given: the user's usual ones, and croft's own if there is
    one. Where there is none at all, croft makes one."""
    found: list[str] = []
    ssh = os.path.join(home(croft.environ), ".ssh")
    own = own_key(croft.environ)
    for path in (*(os.path.join(ssh, name) for name in _USUAL), own):
        try:
            found += read_key(path + ".pub")
        except (UsageError, OSError):
            continue
    return list(dict.fromkeys(found)) or _make_own(croft, own)


def _make_own(croft: Croft, path: str) -> list[str]:
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "croft", "-f", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=True,
        )
        keys = read_key(path + ".pub")
    except (OSError, subprocess.CalledProcessError):
        croft.note("note: you have no SSH key, and ssh-keygen could not make one: see --password")
        return []
    croft.note(f"note: you had no SSH key, so one was made for croft shell: {path}")
    return keys
