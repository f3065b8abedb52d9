"""The AsyncAPI 3.0 document of `/ws`, generated from the message structs."""

from __future__ import annotations

from typing import Any

import msgspec

from yaptext import __version__
from yaptext.errors import wire_codes
from yaptext.wire.frames import CLIENT_MESSAGES, SERVER_MESSAGES


def document() -> dict[str, Any]:
    """A JSON-ready dict; every message of the protocol is under `components.messages` by its tag."""
    _, schemas = msgspec.json.schema_components(
        CLIENT_MESSAGES + SERVER_MESSAGES, ref_template="#/components/schemas/{name}"
    )
    schemas["Error"]["properties"]["error_code"] = {"type": "string", "enum": wire_codes()}
    messages = {
        str(cls.__struct_config__.tag): {"payload": {"$ref": f"#/components/schemas/{cls.__name__}"}}
        for cls in CLIENT_MESSAGES + SERVER_MESSAGES
    }

    def refs(classes: tuple[Any, ...]) -> list[dict[str, str]]:
        return [{"$ref": f"#/channels/ws/messages/{cls.__struct_config__.tag}"} for cls in classes]

    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Yap Text",
            "version": __version__,
            "description": "One JSON object a text frame. A turn: ack, toolcall, token*, final, done.",
        },
        "channels": {
            "ws": {
                "address": "/ws",
                "messages": {tag: {"$ref": f"#/components/messages/{tag}"} for tag in messages},
            }
        },
        "operations": {
            "receive": {"action": "receive", "channel": {"$ref": "#/channels/ws"}, "messages": refs(CLIENT_MESSAGES)},
            "send": {"action": "send", "channel": {"$ref": "#/channels/ws"}, "messages": refs(SERVER_MESSAGES)},
        },
        "components": {
            "messages": messages,
            "schemas": schemas,
            "securitySchemes": {
                "query": {"type": "httpApiKey", "in": "query", "name": "api_key"},
                "ticket": {"type": "httpApiKey", "in": "query", "name": "ticket"},
                "header": {"type": "httpApiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }
