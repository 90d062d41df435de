"""Templates through the API."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from undercroft.client.decode import decode
from undercroft.client.noun import Noun
from undercroft.client.raw import Raw
from undercroft.model.requests import CloneRequest, TaskList, TemplateCreate
from undercroft.model.task import Task
from undercroft.model.template import Template


class TemplatesClient(Noun[Template]):
    """Templates, see `undercroft.operations.templates`."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw, "/v1/templates", Template)

    def create(self, request: TemplateCreate) -> Task:
        """Makes one of a VM."""
        response = self._raw.request(
            "POST",
            self._path,
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(request),
        )
        return decode(response.read(), Task)

    def clone(self, ref: str, request: CloneRequest) -> Sequence[Task]:
        """Makes VMs from it; a task for each."""
        return decode(self._request("POST", ref, "/clone", json=request), TaskList).tasks

    def remove(self, ref: str) -> Template:
        """Removes it; what it was."""
        return decode(self._request("DELETE", ref), Template)
