"""The OpenAPI 3.1 description, made from the routes when somebody asks for it.

Not Litestar's own: that cannot describe structs whose defaults hold a dict (as of 2.25), and makes
less of msgspec's types than msgspec itself does.
"""

from __future__ import annotations

import inspect
from http import HTTPStatus
from typing import Any, get_args

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.params import HeaderParameter, ParameterKwarg
from litestar.response.base import ASGIResponse
from litestar.routes import HTTPRoute

from undercroft import __version__
from undercroft.api.answers import fields_of
from undercroft.api.examples import EXAMPLES
from undercroft.model.errors import Problem

DESCRIPTION = """\
Objects have `meta` (who it is), `spec` (what it should be) and `status` (what it is). What takes
time answers with a task, to be followed under `/v1/tasks` or `/v1/watch`.

Errors are `application/problem+json` (RFC 9457): `code` is stable, `detail` says what was wrong,
`action` what to do.

On the unix socket the kernel tells who asks: root, the daemon's own user, and members of the group
`undercroft`. Over TCP there is only TLS, and a token.
"""
TAGS = {
    "system": "What answers.",
    "vms": "Virtual machines.",
    "snapshots": "VMs as they were.",
    "checkpoints": "Moments of VMs' disks, and what has changed since, for backups.",
    "backups": "VMs as they were, kept elsewhere.",
    "guests": "Into a running VM.",
    "consoles": "Serial and VNC consoles, as WebSockets.",
    "templates": "Frozen VMs to make others from.",
    "images": "What VMs are made from.",
    "exports": "VMs as files for other systems.",
    "imports": "VMs out of files of other systems.",
    "volumes": "The disks of VMs.",
    "datastores": "Where disks are kept.",
    "tasks": "Operations under way.",
    "events": "What happened, and what happens.",
    "hosts": "Machines that run VMs.",
}
_REFERENCE = "#/components/schemas/{name}"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_STREAMED = ("uploadImage", "writeFile", "appendUpload")


def describe(app: Litestar) -> bytes:
    """The document as JSON. Takes a while."""
    handlers = [
        (route.path_format, method.lower(), handler)
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for method, (handler, _) in route.route_handler_map.items()
        if handler.resolve_include_in_schema() and method != "OPTIONS"
    ]
    types = _Types()
    paths: dict[str, dict[str, Any]] = {}
    for path, method, handler in handlers:
        paths.setdefault(path, {})[method] = _operation(path, handler, types)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Undercroft",
                "version": __version__,
                "description": DESCRIPTION,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "security": [{"token": []}, {}],
            "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
            "paths": types.fill(paths),
            "components": {
                "schemas": types.components,
                "securitySchemes": {
                    "token": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "Over TCP; on the unix socket none is needed.",
                    }
                },
            },
        }
    )


class _Types:
    """Collects types, so that their schemas are made together and refer to one another."""

    def __init__(self) -> None:
        self._types: list[Any] = []
        self.components: dict[str, Any] = {}

    def add(self, kind: Any) -> dict[str, Any]:
        """A placeholder for the schema of a type."""
        if kind not in self._types:
            self._types.append(kind)
        return {_PLACE: self._types.index(kind)}

    def fill(self, value: Any) -> Any:
        """The same with schemas in the place of placeholders."""
        schemas, self.components = msgspec.json.schema_components(
            self._types, ref_template=_REFERENCE
        )

        def walk(value: Any) -> Any:
            if isinstance(value, dict):
                if _PLACE in value:
                    return schemas[value[_PLACE]]
                return {key: walk(item) for key, item in value.items()}
            return [walk(item) for item in value] if isinstance(value, list) else value

        return walk(value)


_PLACE = "\0type"


def _operation(path: str, handler: HTTPRouteHandler, types: _Types) -> dict[str, Any]:
    name = str(handler.operation_id)
    parameters: list[dict[str, Any]] = []
    body: dict[str, Any] | None = None
    for field in fields_of(handler):
        if field.name == "data":
            inner = [kind for kind in get_args(field.annotation) if kind is not type(None)]
            content = {"schema": types.add(inner[0] if field.is_optional else field.annotation)}
            if name in EXAMPLES:
                content["example"] = EXAMPLES[name]
            body = {"required": not field.is_optional, "content": {"application/json": content}}
        elif f"{{{field.name}}}" in path:
            text = "Its id." if field.name == "id" else "Its name or id."
            parameters.append(_parameter(field.name, "path", True, text, types.add(str)))
        elif isinstance(field.kwarg_definition, ParameterKwarg):
            wanted = field.kwarg_definition
            place = "header" if isinstance(wanted, HeaderParameter) else "query"
            parameters.append(
                _parameter(
                    wanted.name or field.name,
                    place,
                    field.is_required,
                    wanted.description or "",
                    types.add(field.annotation),
                )
            )
    if name in _STREAMED:
        body = {"required": True, "content": {"application/octet-stream": _BINARY}}
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": handler.summary,
        "description": inspect.getdoc(handler.fn),
        "tags": handler.resolve_tags(),
        "parameters": parameters,
        "responses": _responses(handler, handler.parsed_fn_signature.return_type.annotation, types),
    }
    if body is not None:
        operation["requestBody"] = body
    return operation


def _parameter(
    name: str, place: str, required: bool, description: str, schema: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": required,
        "description": description,
        "schema": schema,
    }


def _responses(handler: HTTPRouteHandler, returned: Any, types: _Types) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if handler.status_code < 400:
        found[str(handler.status_code)] = {
            "description": HTTPStatus(handler.status_code).phrase,
            "content": _content(handler, returned, types),
        }
    for status, response in (handler.responses or {}).items():
        found[str(status)] = {"description": response.description}
        if status != 304:
            schema = {"schema": types.add(response.data_container)}
            found[str(status)]["content"] = {str(response.media_type): schema}
    found["default"] = {
        "description": "Any other error.",
        "content": {"application/problem+json": {"schema": types.add(Problem)}},
    }
    return found


def _content(handler: HTTPRouteHandler, returned: Any, types: _Types) -> dict[str, Any]:
    media_type = str(handler.media_type or "application/json")
    if media_type.startswith("text/"):
        return {media_type: {"schema": {"type": "string"}}}
    arguments = get_args(returned)
    if returned is ASGIResponse or not arguments or arguments[0] is bytes:
        return {media_type: _BINARY}
    return {media_type: {"schema": types.add(arguments[0])}}
