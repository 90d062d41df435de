"""Where the data directory is. Imports next to nothing: every `croft` command asks."""

from __future__ import annotations

import os
from collections.abc import Mapping

SYSTEM = "/var/lib/undercroft"


def data_location(
    given: str | None = None,
    environ: Mapping[str, str] | None = None,
    uid: int | None = None,
) -> str:
    """The absolute path of the data directory; nothing is looked up on disk.

    In this order: ``given`` (``--data``), ``CROFT_DATA``, the system's for root, the user's own
    (``$XDG_DATA_HOME/undercroft``, by default below ``~/.local/share``). A relative
    ``XDG_DATA_HOME`` is ignored, as the XDG base directory specification demands.
    """
    environ = os.environ if environ is None else environ
    chosen = given or environ.get("CROFT_DATA")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    if (os.geteuid() if uid is None else uid) == 0:
        return SYSTEM
    base = environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        home = environ.get("HOME") or os.path.expanduser("~")
        base = os.path.join(home, ".local", "share")
    return os.path.abspath(os.path.join(base, "undercroft"))


def api_socket(data: str) -> str:
    """The path of the API's unix socket in a data directory."""
    return os.path.join(data, "run", "api.sock")
