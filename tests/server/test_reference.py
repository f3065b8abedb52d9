"""server/reference: the OpenAPI document says what the service does, all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from conftest import service
from fakes import ScriptedEngine
from starlette.routing import Route

from yaptext import __version__
from yaptext.engine.base import Engines
from yaptext.server.app import create_app
from yaptext.server.openai import errors
from yaptext.server.openai.responses_schema import ResponsesRequest
from yaptext.server.openai.schema import ChatRequest
from yaptext.server.reference.fields import BOUNDS, MEANINGS, RULES
from yaptext.server.reference.openapi import document
from yaptext.settings import Settings

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]
PARTS_OF_PAGES = {f"/playground/{name}" for name in ("app.js", "style.css", "icon.svg")}
OPERATIONS = [
    pytest.param(path, method, id=f"{method} {path}") for path, item in DOCUMENT["paths"].items() for method in item
]


def resolve(ref: str) -> Any:
    """What a local `$ref` points at."""
    assert ref.startswith("#/")
    found: Any = DOCUMENT
    for step in ref[2:].split("/"):
        found = found[step]
    return found


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for inner in node.values():
            yield from refs(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from refs(inner)


def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema | {"components": DOCUMENT["components"]})


def test_every_route_of_the_app_is_in_the_document() -> None:
    """Also its methods, and no others. What a page loads for itself is no interface."""
    app = create_app(Settings.load(YAP_TEXT_STATE_DIR="/nonexistent"))
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.path not in PARTS_OF_PAGES
        for method in route.methods or {"POST"}  # a class routes all methods itself
        if method != "HEAD"
    }
    assert served == {(path, method) for path, item in DOCUMENT["paths"].items() for method in item}


def test_every_reference_resolves_and_every_schema_is_used() -> None:
    """No `$ref` leads nowhere, and nothing stands in the document that no route has."""
    found = list(refs(DOCUMENT))
    assert all(resolve(ref) is not None for ref in found)
    for kind in ("schemas", "headers", "parameters"):
        assert {f"#/components/{kind}/{name}" for name in DOCUMENT["components"][kind]} <= set(found)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_a_json_schema_that_its_examples_fit(name: str) -> None:
    """OpenAPI 3.1 takes the schemas of JSON Schema 2020-12 as they are."""
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    for example in SCHEMAS[name].get("examples", []):
        validator({"$ref": f"#/components/schemas/{name}"}).validate(example)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation_is_described(path: str, method: str) -> None:
    """Name, summary, key, the meaning of every answer. Refused clients learn when to come back."""
    operation = DOCUMENT["paths"][path][method]
    assert operation["operationId"] and operation["summary"]
    for status, answer in operation["responses"].items():
        assert answer["description"]
        if status in ("429", "503"):
            assert "Retry-After" in answer["headers"]
            assert ("retry-after-ms" in answer["headers"]) == path.startswith("/v1/")
    assert ("401" in operation["responses"]) == bool(operation["security"])
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        validator(body["schema"]).validate(body["example"])


@pytest.mark.parametrize("struct", [ChatRequest, ResponsesRequest])
def test_requests_are_described_by_the_struct_that_reads_them(struct: Any) -> None:
    """Field by field, each with its meaning."""
    described = json.loads(json.dumps(SCHEMAS[struct.__name__]))
    expected = msgspec.json.schema_components([struct])[1][struct.__name__]
    described["properties"], expected["properties"] = (
        {name: json.loads(re.sub(r'"#/[^"]*[/.](\w+)"', r'"\1"', json.dumps(field))) for name, field in each.items()}
        for each in (described["properties"], expected["properties"])
    )
    for rule in RULES.get(struct.__name__, {}):
        del described[rule]
    for name, field in described["properties"].items():
        assert field.pop("description")
        if f"{struct.__name__}.{name}" in BOUNDS:  # has bounds that are checked later
            del expected["properties"][name], field
            described["properties"][name] = None
    later = {name.partition(".")[2] for name in BOUNDS if name.startswith(f"{struct.__name__}.")}
    expected["properties"] |= dict.fromkeys(later)
    assert described == expected


def test_every_meaning_is_of_a_field() -> None:
    """None is left of a field that has gone."""
    fields = {f"{name}.{field}" for name, schema in SCHEMAS.items() for field in schema.get("properties", {})}
    assert [
        meant for meant in MEANINGS if not any(f in (meant, f.partition(".")[0] + "." + meant) for f in fields)
    ] == []


@pytest.mark.parametrize("field", list(BOUNDS))
async def test_bounds_that_are_checked_later_are_those_of_the_document(field: str) -> None:
    """What the schema allows at its edges is served, and what it forbids is refused."""
    struct, _, field = field.partition(".")
    schema = {"$ref": f"#/components/schemas/{struct}/properties/{field}"}
    path, said = {
        "ChatRequest": ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        "ResponsesRequest": ("responses", {"input": "hi"}),
    }[struct]
    values: list[Any] = [None, False, True, 0, 1, 2, -1, 20, 1000, 1001, 0.1, 0.05, 2.5, 2**63 - 1, 2**63, "x" * 64]
    values += ["x" * 65, ["x"] * 8, ["x"] * 9, [""], ["x" * 64], ["x" * 65]]
    engine = ScriptedEngine()
    seen = set()
    async with service(Engines(engine, engine)) as running, httpx.AsyncClient(timeout=60) as client:
        for value in values:
            headers = {"X-API-Key": "yap_token"}
            answer = await client.post(f"{running.http}/v1/{path}", json=said | {field: value}, headers=headers)
            assert (answer.status_code == 200) == validator(schema).is_valid(value), (value, answer.text)
            seen.add(answer.status_code)
    assert seen == {200, 400}


def test_every_error_of_the_doors_is_in_the_document() -> None:
    """With its status, in each form."""
    statuses = {str(form[0]) for form in errors._FORMS.values()}
    assert statuses <= set(DOCUMENT["paths"]["/v1/chat/completions"]["post"]["responses"])
    detail = SCHEMAS["ErrorDetail"]["properties"]
    assert {form[1] for form in errors._FORMS.values()} == set(detail["type"]["enum"])
    assert {form[2] for form in errors._FORMS.values()} | {"host_not_allowed", *errors._BY_PLACE.values()} == set(
        detail["code"]["enum"]
    )


def test_the_document_is_plain_json_and_new_each_time() -> None:
    """What one caller does to the document, the next does not see."""
    assert json.loads(json.dumps(document())) == DOCUMENT
    document()["paths"].clear()
    assert document()["paths"]
    assert (DOCUMENT["openapi"], DOCUMENT["info"]["version"]) == ("3.1.0", __version__)
