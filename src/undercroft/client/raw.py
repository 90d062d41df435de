"""Requests with plain dicts, for commands that must be quick: needs neither msgspec nor the models.

Errors are still those of `undercroft.model.errors`; they are only imported when one happens.
"""

from __future__ import annotations

from undercroft.client.connect import Endpoint
from undercroft.client.connection import broken
from undercroft.client.transport import TIMEOUT, Response, Transport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any, Self

    from undercroft.model.errors import UndercroftError

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
PAGE = 1000  # items asked for at once; the server's limit


def quote(text: str, safe: bytes = b"") -> str:
    """Percent-encoding (RFC 3986, section 2.1), without the weight of ``urllib.parse``."""
    keep = _UNRESERVED.union(safe)
    return "".join(chr(byte) if byte in keep else f"%{byte:02X}" for byte in text.encode())


def target(path: str, params: Mapping[str, object] | None = None) -> str:
    """A request target; parameters that are None are left out, lists become comma lists."""
    pairs = []
    for name, value in (params or {}).items():
        if value is None:
            continue
        if isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, (list, tuple)):
            text = ",".join(str(part) for part in value)
        else:
            text = str(value)
        pairs.append(f"{quote(name)}={quote(text, b',:*/')}")
    return f"{path}?{'&'.join(pairs)}" if pairs else path


class Raw:
    """The API as it is on the wire."""

    def __init__(self, endpoint: Endpoint, timeout: float = TIMEOUT) -> None:
        self.transport = Transport(endpoint, timeout)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        timeout: float | None = None,
    ) -> Response:
        """Sends a request; an answer of 400 or more is raised as the error that it tells of."""
        response = self.transport.request(
            method, target(path, params), headers=headers, body=body, timeout=timeout
        )
        if response.status >= 400:
            raise problem_error(self.transport.where, response.status, response.read())
        return response

    def get(self, path: str, params: Mapping[str, object] | None = None) -> Any:
        """The decoded answer to a GET."""
        return self._json(self.request("GET", path, params=params))

    def post(
        self, path: str, body: object = None, params: Mapping[str, object] | None = None
    ) -> Any:
        """The decoded answer to a POST; ``body`` is sent as JSON unless None."""
        return self._send("POST", path, body, params)

    def patch(self, path: str, body: object, params: Mapping[str, object] | None = None) -> Any:
        """The decoded answer to a PATCH."""
        return self._send("PATCH", path, body, params)

    def delete(self, path: str, params: Mapping[str, object] | None = None) -> Any:
        """The decoded answer to a DELETE."""
        return self._json(self.request("DELETE", path, params=params))

    def list(self, path: str, params: Mapping[str, object] | None = None) -> Iterator[Any]:
        """The items of all pages of a listing."""
        query = {"limit": PAGE, **(params or {})}
        while True:
            page = self.get(path, query)
            yield from page["items"]
            if not page.get("next"):
                return
            query["cursor"] = page["next"]

    def _send(
        self, method: str, path: str, body: object, params: Mapping[str, object] | None
    ) -> Any:
        if body is None:
            return self._json(self.request(method, path, params=params))
        import json

        return self._json(
            self.request(
                method,
                path,
                params=params,
                headers={"content-type": "application/json"},
                body=json.dumps(body).encode(),
            )
        )

    def _json(self, response: Response) -> Any:
        import json

        data = response.read()
        try:
            return json.loads(data) if data else None
        except ValueError:
            raise broken(self.transport.where, "that is not JSON") from None

    def close(self) -> None:
        """Ends the connection."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def problem_error(where: str, status: int, body: bytes) -> UndercroftError:
    """The error that a problem document (RFC 9457) tells of; also makes do with anything else."""
    import json

    from undercroft.model.errors import Problem, error_from_problem

    try:
        fields = json.loads(body)
        data = fields.get("data")
        problem = Problem(
            title=str(fields.get("title", "")),
            status=status,
            code=str(fields["code"]),
            detail=str(fields.get("detail", "")),
            object=_text(fields.get("object")),
            action=_text(fields.get("action")),
            data={str(key): value for key, value in data.items() if key not in _TAKEN}
            if isinstance(data, dict)
            else {},
        )
    except (ValueError, KeyError, AttributeError):
        return broken(where, f"status {status} without an explanation")
    return error_from_problem(problem)


_TAKEN = ("self", "message", "object", "action")  # parameters of the errors themselves


def _text(value: object) -> str | None:
    return None if value is None else str(value)
