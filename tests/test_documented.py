"""documented.py: the check that every end-to-end test runs under can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
from documented import Documented, fault_of

from yaptext.server.reference import examples
from yaptext.server.send_queue import WRITE_NOW
from yaptext.wire import meanings

TOKEN = {"type": "token", "text": "a", "turn": 1}
HEADERS = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
OVERLOAD = json.dumps(examples.BODIES["OpenAIError"]).encode()
CHUNK = examples.BODIES["Chunk"]


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        (TOKEN, None),
        (TOKEN | {"text": 1}, "is not of type"),
        (TOKEN | {"more": 1}, "Additional properties"),
        ({"type": "token", "turn": 1}, "required"),
        ({"type": "start"} | meanings.EXAMPLES["start"], "no frame of type 'start'"),
        ({"type": "error", "error_code": "unheard_of", "message": "x"}, "is not one of"),
        ([], "no frame of type None"),
    ],
)
def test_a_wrong_frame_is_a_fault(frame: Any, fault: str | None) -> None:
    """A wrong type, a field too many, one too few, a client's frame, a code that is not published."""
    found = fault_of(frame)
    assert (found is None) if fault is None else (fault in str(found))


async def _served(scope: dict[str, Any], events: list[dict[str, Any]], asked: bytes = b"") -> Documented:
    """An app that sends these events, and what the check found."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for event in events:
            if (write := scope["extensions"].get(WRITE_NOW)) and event["type"] == "websocket.send":
                assert write(event["text"].encode())
            else:
                await send(event)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": asked}

    async def send(event: Any) -> None:
        pass

    documented = Documented(app)
    await documented({"path": "/ws", "extensions": {}} | scope, receive, send)
    return documented


@pytest.mark.parametrize("extension", [{}, {WRITE_NOW: lambda frame: True}])
async def test_frames_are_seen_however_they_are_sent(extension: dict[str, Any]) -> None:
    """As an ASGI event, or written past it; a close code counts, too."""
    wrong = {"type": "websocket.send", "text": json.dumps(TOKEN | {"turn": "1"})}
    right = {"type": "websocket.send", "text": json.dumps(TOKEN)}
    close = {"type": "websocket.close", "code": 1234}
    found = await _served({"type": "websocket", "extensions": extension}, [right, wrong, close])
    assert found.seen == {"frame token": 2, "close 1234": 1}
    assert [fault.partition(":")[0] for fault in found.faults] == ["frame token", "close 1234"]


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "body", "fault"),
    [
        ("GET", "/livez", 200, HEADERS, b'{"status": "ok"}', None),
        ("GET", "/livez", 200, HEADERS, b'{"status": "fine"}', "is not valid under any"),
        ("GET", "/livez", 500, HEADERS, b"{}", "no such status"),
        ("POST", "/livez", 200, HEADERS, b"{}", "no such method"),
        ("GET", "/livez", 200, EVENTS, b"{}", "no 'text/event-stream'"),
        ("GET", "/livez", 200, [*HEADERS, (b"ETag", b"x")], b'{"status": "ok"}', "no header etag"),
        ("GET", "/docs", 304, HEADERS, b"{}", "a body that is not documented"),
        ("GET", "/v1/models/a/b", 429, HEADERS, OVERLOAD, "when to come back"),
        ("POST", "/v1/chat/completions", 200, EVENTS, b": ping\n\ndata: %b\n\ndata: [DONE]\n\n", None),
        ("POST", "/v1/chat/completions", 200, EVENTS, b'data: %b\n\ndata: {"a": 1}\n\n', "is not valid under any"),
        ("POST", "/v1/chat/completions", 200, EVENTS, b"data: %b\n\n", "a request that is not documented was served"),
    ],
)  # fmt: skip
async def test_a_wrong_response_is_a_fault(
    method: str, path: str, status: int, headers: Any, body: bytes, fault: str | None
) -> None:
    """A wrong status, method, type, header, body or event; and a request that the document does not allow."""
    asked = b"{}" if fault is not None and "request" in fault else json.dumps(examples.CHAT_REQUEST).encode()
    events = [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body.replace(b"%b", json.dumps(CHUNK).encode())},
    ]
    found = await _served({"type": "http", "method": method, "path": path}, events, asked)
    assert sum(found.seen.values()) == 1
    assert (found.faults == []) if fault is None else (fault in found.faults[0])
