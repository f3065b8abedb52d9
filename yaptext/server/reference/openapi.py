"""The OpenAPI 3.1 document of the HTTP routes, generated from the structs that read requests."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec

from yaptext import __version__
from yaptext.server.reference import examples
from yaptext.server.reference.fields import BOUNDS, MEANINGS, RULES
from yaptext.server.reference.operations import EVENTS, JSON, OPERATIONS, SOCKET_CLOSES, Answer, Content, Operation
from yaptext.wire import asyncapi

Refs = dict[Any, dict[str, Any]]
"""The reference to the schema of a struct, by the struct."""
_ABOUT = (
    "Conversations go over the WebSocket `/ws`, which `/asyncapi.json` describes. Clients of OpenAI's API use the "
    "routes below `/v1`. Another path is answered with 404, another method with 405. A request that is no HTTP, or "
    "whose address, headers or body are over the limits, is answered with 400, 414 or 431 as plain text."
)
_SOCKET = (
    "A WebSocket of the same address, or of `/v1`, takes requests as frames of the type `response.create`. It answers "
    "each with the events of a stream, in order. `generate: false` computes the prompt alone. A refused client gets "
    "the reason as the HTTP answer to its handshake."
)
_WAYS: dict[str, list[dict[str, list[str]]]] = {
    "none": [],
    "header": [{"bearer": []}, {"header": []}],
    "any": [{"bearer": []}, {"header": []}, {"query": []}],
    "remote": [{}, {"bearer": []}, {"header": []}, {"query": []}],
}
_HEADERS = {
    "Retry-After": ("Time after which a retry may succeed, in whole seconds.", {"type": "integer", "minimum": 0}),
    "retry-after-ms": ("The same in milliseconds, for clients of OpenAI's API.", {"type": "integer", "minimum": 0}),
    "ETag": ("Names this version of the content.", {"type": "string"}),
    "Cache-Control": ("How long the answer may be kept.", {"type": "string"}),
}  # fmt: skip
_PARAMETERS: dict[str, dict[str, Any]] = {
    "If-None-Match": {
        "in": "header",
        "description": "The ETag of what the client has.",
        "schema": {"type": "string"},
    },
    "name": {"in": "path", "required": True, "description": "What `model` may be.", "schema": {"type": "string"}},
}


def document() -> dict[str, Any]:
    """A JSON-ready dict."""
    refs, schemas = _schemas()
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Yap Text",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": {
                name: {"description": meaning, "schema": schema} for name, (meaning, schema) in _HEADERS.items()
            },
            "parameters": {name: {"name": name} | parameter for name, parameter in _PARAMETERS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "query": {"type": "apiKey", "in": "query", "name": "api_key"},
            },
        },
    }


def _schemas() -> tuple[Refs, dict[str, Any]]:
    """The references, and the schemas by name, with the meanings of their fields."""
    structs = sorted({each for operation in OPERATIONS for each in _structs(operation)}, key=str)
    made = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    # If two structs have one name, the schema of each has the name of its module before it.
    refs, schemas = json.loads(json.dumps(made).replace("yaptext.server.openai.", ""))
    of_frames = asyncapi.document()["components"]["schemas"]
    for qualified, schema in schemas.items():
        name = qualified.rpartition(".")[2]
        for field, properties in schema.get("properties", {}).items():
            meaning = MEANINGS.get(f"{name}.{field}") or MEANINGS.get(field)
            if name in of_frames and field in of_frames[name]["properties"]:
                meaning = of_frames[name]["properties"][field]["description"]
            if meaning is not None:
                properties["description"] = meaning
            bounds = BOUNDS.get(f"{name}.{field}", {})
            for part in properties.get("anyOf", [properties]):
                part.update(bounds.get(part.get("type"), {}))
        schema.update(RULES.get(name, {}))
        if name in examples.BODIES:
            schema["examples"] = [examples.BODIES[name]]
    return dict(zip(structs, refs, strict=True)), dict(sorted(schemas.items()))


def _structs(operation: Operation) -> set[Any]:
    found: set[Any] = {operation.body, *itertools.chain(*operation.socket or ())} - {None}
    for answer in operation.answers.values():
        for content in answer.content.values():
            found |= set() if isinstance(content, str) else set(content)
    return found


def _operation(operation: Operation, refs: Refs) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "security": _WAYS[operation.key],
        "responses": {str(status): _answer(answer, refs) for status, answer in sorted(operation.answers.items())},
    }
    if operation.meaning:
        found["description"] = operation.meaning
    if operation.parameters:
        found["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in operation.parameters]
    if operation.body is not None:
        body = {"schema": _schema((operation.body,), refs)} | (
            {"example": operation.example} if operation.example else {}
        )
        found["requestBody"] = {"required": True, "content": {JSON: body}}
    if operation.socket is not None:
        sent, received = operation.socket
        found["x-websocket"] = {
            "description": _SOCKET,
            "receive": {"schema": _schema(sent, refs)},
            "send": {"schema": _schema(received, refs)},
            "closeCodes": {str(code): meaning for code, meaning in SOCKET_CLOSES.items()},
        }
    return found


def _answer(answer: Answer, refs: Refs) -> dict[str, Any]:
    found: dict[str, Any] = {"description": answer.meaning}
    if answer.headers:
        found["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in answer.headers}
    if answer.content:
        found["content"] = {media: _media(media, content, refs) for media, content in answer.content.items()}
    return found


def _media(media: str, content: Content, refs: Refs) -> dict[str, Any]:
    if isinstance(content, str):
        return {"schema": {"type": "string", "description": content}}
    schema = _schema(content, refs)
    if media == EVENTS:  # the schema is that of one event, as in the items of OpenAPI 3.2
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, {"contentMediaType": JSON, "contentSchema": schema}]}
        schema = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"schema": schema}


def _schema(structs: tuple[Any, ...], refs: Refs) -> dict[str, Any]:
    """That of one struct, or of any of several."""
    found = [refs[struct] for struct in structs]
    return dict(found[0]) if len(found) == 1 else {"anyOf": found}
