"""What every command is given: where the daemon is, how to speak, how output shall look."""

from __future__ import annotations

import os
import sys

from undercroft.cli.errors import ours
from undercroft.cli.output import Style
from undercroft.store.location import api_socket, data_location

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from undercroft.client.connect import Endpoint
    from undercroft.client.raw import Raw


class Croft:
    """One call of croft. ``api`` connects when it is first used, and starts the daemon if need be.

    ``data`` is the data directory, ``url`` a daemon elsewhere (then nothing is ever started).
    """

    def __init__(
        self,
        *,
        data: str | None = None,
        url: str | None = None,
        json: bool = False,
        quiet: bool = False,
        color: bool = True,
        verbose: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.environ = os.environ if environ is None else environ
        if url is None and data is None:
            url = self.environ.get("CROFT_URL") or None
        self.url = url
        self.data = data_location(data, self.environ)
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self.out = Style(sys.stdout, self.environ, color)
        self.err = Style(sys.stderr, self.environ, color)
        self._api: Raw | None = None

    @property
    def connected(self) -> bool:
        """Whether a daemon has been spoken to."""
        return self._api is not None

    @property
    def api(self) -> Raw:
        """The API as plain dicts.

        Raises:
            DaemonError: no daemon answers, and none could be started.
            ForbiddenError: the data directory belongs to somebody else.
        """
        if self._api is None:
            self._api = self.connect()
        return self._api

    @property
    def endpoint(self) -> Endpoint:
        """Where the daemon is."""
        from undercroft.client.connect import find_endpoint

        environ = {**self.environ, "CROFT_URL": self.url or ""}
        return find_endpoint(api_socket(self.data), environ)

    def use(self, api: Raw) -> None:
        """Takes a connection that is there already."""
        self._api = api

    def connect(self, start: bool = True, timeout: float | None = None) -> Raw:
        """A connection to the daemon that answers; see `api`. Without ``start`` none is started.
        ``timeout`` in seconds: how long it may take to answer."""
        from undercroft.client.raw import Raw
        from undercroft.client.transport import TIMEOUT

        raw = Raw(self.endpoint, TIMEOUT if timeout is None else timeout)
        if self.url is not None or not start:
            raw.transport.put_back(raw.transport.connect())
            return raw
        # A socket that is there mostly answers: no look at locks and files before.
        try:
            raw.transport.put_back(raw.transport.connect())
        except Exception as error:
            known = ours(error)
            if known is None or known.code != "daemon":
                raise
            from undercroft.cli.spawn import ensure_daemon

            raw.transport.put_back(ensure_daemon(self, raw.transport))
        return raw

    def say(self, text: str) -> None:
        """A line for the user on stdout, unless they want quiet or JSON."""
        if not self.quiet and not self.json:
            print(text)

    def note(self, text: str) -> None:
        """A line for the user on stderr, unless they want quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def print_json(self, value: Any) -> None:
        """The value as JSON on stdout."""
        import json

        print(json.dumps(value, indent=2, ensure_ascii=False))
