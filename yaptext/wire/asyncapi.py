"""The AsyncAPI 3.0 document of `/ws`, generated from the message structs."""

from __future__ import annotations

from typing import Any

import msgspec

from yaptext import __version__
from yaptext.errors import WireError, wire_codes
from yaptext.wire.frames import CLIENT_MESSAGES, SERVER_MESSAGES
from yaptext.wire.meanings import CLOSES, CODES, EXAMPLES, FIELDS, MESSAGES, REPLIES, VALUES

_ABOUT = (
    "Each text frame is one JSON object. A turn is `ack`, `toolcall`, `token` (any number), `final`, `done`. A socket "
    "runs one turn at a time, and so does a session. The service reads binary frames as text, and sends none. It "
    "ignores fields that it does not know, except in `sampling`. Clients should ignore unknown fields and types, too."
)
_DOOR = (
    "A refused client gets one `error`, then the close code of its `error_code`. During a start the handshake is "
    "answered with HTTP 503 and `Retry-After` instead; through a proxy also during a drain."
)
_WAYS = {
    "query": {"type": "httpApiKey", "in": "query", "name": "api_key", "description": "A key. Addresses get logged."},
    "ticket": {
        "type": "httpApiKey",
        "in": "query",
        "name": "ticket",
        "description": "A ticket of `POST /ticket`. It opens one socket, within a minute.",
    },
    "header": {"type": "httpApiKey", "in": "header", "name": "X-API-Key", "description": "A key."},
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key."},
}


def document() -> dict[str, Any]:
    """A JSON-ready dict; every message of the protocol is under `components.messages` by its tag."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Yap Text",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "service": {
                "host": "{host}",
                "protocol": "ws",
                "description": "`wss` behind a proxy that has a certificate.",
                "variables": {"host": {"default": "127.0.0.1:8000", "description": "HOST and PORT of the service."}},
                "security": [{"$ref": f"#/components/securitySchemes/{way}"} for way in _WAYS],
            }
        },
        "channels": {
            "ws": {
                "address": "/ws",
                "title": "A conversation",
                "description": _DOOR,
                "servers": [{"$ref": "#/servers/service"}],
                "messages": {tag: {"$ref": f"#/components/messages/{tag}"} for tag in MESSAGES},
                "bindings": {"ws": {"method": "GET", "bindingVersion": "0.1.0"}},
                "x-close-codes": {str(code): meaning for code, meaning in CLOSES.items()},
                "x-error-codes": {code: _code(code) for code in wire_codes()},
            }
        },
        "operations": {tag: _operation(tag) for tag in map(_tag, CLIENT_MESSAGES)}
        | {
            "send": {
                "action": "send",
                "channel": {"$ref": "#/channels/ws"},
                "summary": "Frames that answer no frame of this socket: a refusal, a drain, a turn ended elsewhere.",
                "messages": _refs(("error", "done")),
            }
        },
        "components": {
            "messages": {_tag(cls): _message(cls) for cls in CLIENT_MESSAGES + SERVER_MESSAGES},
            "schemas": _schemas(),
            "securitySchemes": {way: dict(scheme) for way, scheme in _WAYS.items()},
        },
    }


def _tag(cls: type[msgspec.Struct]) -> str:
    return str(cls.__struct_config__.tag)


def _refs(tags: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"$ref": f"#/channels/ws/messages/{tag}"} for tag in tags]


def _operation(tag: str) -> dict[str, Any]:
    """What the service does with a client's frame."""
    channel = {"$ref": "#/channels/ws"}
    found = {"action": "receive", "channel": channel, "summary": MESSAGES[tag], "messages": _refs((tag,))}
    return found | ({"reply": {"channel": channel, "messages": _refs(REPLIES[tag])}} if tag in REPLIES else {})


def _message(cls: type[msgspec.Struct]) -> dict[str, Any]:
    tag = _tag(cls)
    return {
        "name": tag,
        "summary": MESSAGES[tag],
        "payload": {"$ref": f"#/components/schemas/{cls.__name__}"},
        "examples": [{"payload": {"type": tag} | EXAMPLES[tag]}],
    }


def _schemas() -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(
        CLIENT_MESSAGES + SERVER_MESSAGES, ref_template="#/components/schemas/{name}"
    )
    for field, values in {"Error.error_code": wire_codes(), **VALUES}.items():
        name, _, field_name = field.partition(".")
        schemas[name]["properties"][field_name] = {"type": "string", "enum": list(values)}
    for name, schema in schemas.items():
        for field, properties in schema.get("properties", {}).items():
            properties["description"] = FIELDS.get(f"{name}.{field}") or FIELDS[field]
    return schemas


def _code(code: str) -> dict[str, Any]:
    """What an error means, and its close code if it closes the socket."""
    (close,) = {cls.close_code for cls in _errors(WireError) if cls.code == code}
    return {"description": CODES[code]} | ({} if close is None else {"closeCode": close})


def _errors(root: type[WireError]) -> list[type[WireError]]:
    return [found for cls in root.__subclasses__() for found in (cls, *_errors(cls))]
