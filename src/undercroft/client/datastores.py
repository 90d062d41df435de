"""Datastores through the API."""

from __future__ import annotations

import msgspec

from undercroft.client.decode import decode
from undercroft.client.noun import Noun
from undercroft.client.raw import Raw
from undercroft.model.datastore import Datastore
from undercroft.model.requests import DatastoreChange, DatastoreCreate


class DatastoresClient(Noun[Datastore]):
    """Datastores, see `undercroft.operations.datastores`."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw, "/v1/datastores", Datastore)

    def create(self, request: DatastoreCreate) -> Datastore:
        """Makes a directory of the daemon's host one."""
        response = self._raw.request(
            "POST",
            self._path,
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(request),
        )
        return decode(response.read(), Datastore)

    def set(self, ref: str, change: DatastoreChange, if_match: int | None = None) -> Datastore:
        """Changes it; with ``if_match`` only if it is still at this revision.

        Raises:
            StaleError: it changed meanwhile.
        """
        headers = {} if if_match is None else {"if-match": f'"{if_match}"'}
        return decode(self._request("PATCH", ref, json=change, headers=headers), Datastore)

    def remove(self, ref: str) -> Datastore:
        """Removes one that nothing is in; what it was."""
        return decode(self._request("DELETE", ref), Datastore)
