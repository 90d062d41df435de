"""Every error leaves as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from undercroft.model.errors import (
    InvalidError,
    NotFoundError,
    Problem,
    TooLargeError,
    UndercroftError,
)

MEDIA_TYPE = "application/problem+json"
_log = structlog.get_logger(__name__)


def problem_body(problem: Problem) -> bytes:
    """A problem as it is sent."""
    return msgspec.json.encode(problem, enc_hook=str)


def problem_headers(problem: Problem) -> dict[str, str]:
    """What goes with it."""
    headers = {"cache-control": "no-store"}
    if problem.status == 401:
        headers["www-authenticate"] = 'Bearer realm="undercroft"'
    if problem.status in (429, 503):
        headers["retry-after"] = "1"
    return headers


def internal_error(error: BaseException, where: str) -> UndercroftError:
    """What the caller is told of a fault of ours; the log gets all of it."""
    _log.error("internal error", where=where, exc_info=error)
    return UndercroftError(
        "something went wrong inside of Undercroft",
        action="see the daemon's log (daemon.log in its data directory), and report it",
    )


def to_problem(error: Exception, where: str) -> tuple[Problem, dict[str, str]]:
    """Any error as a problem, and its headers."""
    headers: dict[str, str] = {}
    if isinstance(error, UndercroftError):
        problem = error.problem()
    elif isinstance(error, HTTPException):
        problem = _from_http(error, where)
        headers = {k.lower(): v for k, v in (error.headers or {}).items() if k.lower() == "allow"}
    else:
        problem = internal_error(error, where).problem()
    return problem, problem_headers(problem) | headers


def _from_http(error: HTTPException, where: str) -> Problem:
    if isinstance(error, ValidationException):
        return _from_validation(error).problem()
    if error.status_code == 404:
        return NotFoundError(
            "there is no such path", object=where, action="see /v1/openapi.json"
        ).problem()
    if error.status_code == 413:
        return TooLargeError("the request is larger than 1M").problem()
    if error.status_code >= 500:
        return internal_error(error, where).problem()
    problem = InvalidError(
        "this method is not possible here"
        if error.status_code == 405
        else (error.detail or "the request makes no sense").splitlines()[0][:500]
    ).problem()
    return msgspec.structs.replace(
        problem,
        status=error.status_code,
        title=HTTPStatus(error.status_code).phrase
        if error.status_code in HTTPStatus._value2member_map_
        else problem.title,
    )


def _from_validation(error: ValidationException) -> InvalidError:
    """Parameters in the query that are missing or of the wrong type."""
    found: list[Any] = error.extra if isinstance(error.extra, list) else []
    if not found:
        return InvalidError(error.detail.split("?", maxsplit=1)[0][:500])
    first = found[0]
    key, message = first.get("key", "?"), str(first.get("message", "is wrong"))
    if key == "data" or message == "'data'":
        return InvalidError("the request has no body", action="send a JSON object")
    return InvalidError(f"parameter {key}: {message[:1].lower()}{message[1:]}", parameter=key)


def answer_problem(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The exception handler of the application."""
    problem, headers = to_problem(error, f"{request.method} {request.scope['path'][:200]}")
    return Response(
        content=problem_body(problem),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=headers,
    )
