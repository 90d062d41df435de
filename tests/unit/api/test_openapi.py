"""The description, and requests made up from it: whatever they hold, the API keeps its word."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.api.world import World, ask, running_world
from undercroft.api.examples import EXAMPLES
from undercroft.client.client import Client
from undercroft.client.raw import quote, target
from undercroft.model.vm import VMState
from undercroft.operations import backups

METHODS = {"get", "post", "put", "patch", "delete"}


@pytest.fixture
async def document(world: World) -> dict[str, Any]:
    found: dict[str, Any] = await ask(world, lambda c: c.raw.get("/v1/openapi.json"))
    return found


def operations(document: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Path, method and description by operation id."""
    found = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert method in METHODS
            assert operation["operationId"] not in found
            found[operation["operationId"]] = (path, method, operation)
    return found


async def test_everything_is_described(document: dict[str, Any]) -> None:
    found = operations(document)
    assert set(EXAMPLES) <= set(found)
    tags = {tag["name"] for tag in document["tags"]}
    for name, (path, _, operation) in found.items():
        assert operation["summary"], name
        assert operation["description"], name
        assert set(operation["tags"]) <= tags, name
        assert operation["tags"], name
        for parameter in operation["parameters"]:
            assert parameter["description"], (name, parameter["name"])
        wanted = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert {p["name"] for p in operation["parameters"] if p["in"] == "path"} == wanted
        problem = operation["responses"]["default"]["content"]["application/problem+json"]
        assert problem["schema"] == {"$ref": "#/components/schemas/Problem"}
    for path in ("/v1/vms/{ref}/start", "/v1/images/upload", "/v1/events/stream", "/metrics"):
        assert path in document["paths"]
    created = document["paths"]["/v1/vms"]["post"]
    schema = created["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/VMCreate"}
    assert "additionalProperties" in document["components"]["schemas"]["VMCreate"]
    answer = created["responses"]["202"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/Task"}


async def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            reference = value.get("$ref")
            if isinstance(reference, str):
                assert reference.removeprefix("#/components/schemas/") in schemas, reference
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)


async def test_the_examples_are_understood(world: World, document: dict[str, Any]) -> None:
    await world.add_vms(1, VMState.RUNNING)

    def work(client: Client) -> None:
        for name, (path, method, operation) in operations(document).items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is None:
                continue
            example = json.dumps(body["example"]).encode()
            assert name in EXAMPLES, f"{name} takes a body, so it needs an example"
            response = client.raw.transport.request(
                method.upper(),
                path.replace("{ref}", "web0").replace("{drive}", "0"),
                body=example,
            )
            answer = response.read()
            # The world may lack the image, or be in another state; the request itself is good.
            assert response.status in (200, 201, 202, 404, 409), answer

    await ask(world, work)


texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["web0", "web1", "self", "tiny", "1", "-1", "1e9", "true", "null", "/etc/passwd"]
    ),
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), texts
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def bodies(
    schema: dict[str, Any], schemas: dict[str, Any], depth: int = 0
) -> st.SearchStrategy[Any]:
    """Values that fit the schema, mostly."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        return st.one_of([bodies(option, schemas, depth) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "object" and depth < 4:
        fields = {
            name: bodies(inner, schemas, depth + 1) | values
            for name, inner in schema.get("properties", {}).items()
        }
        needed = {name: fields.pop(name) for name in schema.get("required", []) if name in fields}
        return st.fixed_dictionaries(needed, optional=fields)
    if kind == "array" and depth < 4:
        inner = schema.get("items") or {}
        return st.lists(
            bodies(inner if isinstance(inner, dict) else {}, schemas, depth + 1), max_size=3
        )
    return {
        "string": texts,
        "integer": st.integers(-5, 2**40),
        "number": st.floats(-1, 1e6),
        "boolean": st.booleans(),
        "null": st.none(),
    }.get(str(kind), values)


def test_made_up_requests(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request, however odd, makes a fault of ours (500), an answer that is not described, or an
    error that is no problem document."""
    monkeypatch.setattr(backups, "PATIENCE", 0.05)  # nobody here carries out tasks
    base = tmp_path_factory.mktemp("made-up")
    loop = asyncio.new_event_loop()
    context = running_world(Path(base) / "data")
    world = loop.run_until_complete(context.__aenter__())
    try:
        loop.run_until_complete(world.add_vms(2, VMState.RUNNING))
        document = loop.run_until_complete(ask(world, lambda c: c.raw.get("/v1/openapi.json")))
        known = operations(document)
        schemas = document["components"]["schemas"]
        skipped = {"followEvents", "watch", "openConsole", "openDisplay"}  # these do not end

        @given(st.data())
        @settings(
            max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        def send(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(sorted(set(known) - skipped)))
            path, method, operation = known[name]
            query: dict[str, object] = {}
            headers = {}
            for parameter in operation["parameters"]:
                value = str(data.draw(bodies(parameter["schema"], schemas) | texts))
                if parameter["in"] == "path":
                    path = path.replace(f"{{{parameter['name']}}}", quote(value))
                elif parameter["in"] == "header":
                    headers[parameter["name"]] = quote(value)
                elif parameter["name"] != "wait" and (
                    parameter["required"] or data.draw(st.booleans())
                ):
                    query[parameter["name"]] = value
            body = None
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]
                if "application/json" in content:
                    schema = content["application/json"]["schema"]
                    made = data.draw(bodies(schema, schemas) | values)
                    if isinstance(made, dict) and name == "execInVM":
                        made["timeout"] = 0.01
                    body = json.dumps(made).encode()
                else:
                    body = data.draw(st.binary(max_size=200))

            def work(client: Client) -> tuple[int, str, bytes]:
                response = client.raw.transport.request(
                    method.upper(), target(path, query), headers=headers, body=body
                )
                return response.status, response.headers.get("content-type", ""), response.read()

            status, kind, answer = loop.run_until_complete(ask(world, work))
            assert status != 500, answer
            assert str(status) in operation["responses"] or status >= 400, (name, status)
            if status >= 400:
                assert kind == "application/problem+json", (name, status, answer)
                problem = json.loads(answer)
                assert problem["detail"]
                assert problem["status"] == status

        send()
        loop.run_until_complete(ask(world, lambda c: c.version()))
    finally:
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
