"""Holds what the service sends against the documents that it publishes: every frame of `/ws`, every body of HTTP."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from types import SimpleNamespace
from typing import Any

from jsonschema_rs import Draft202012Validator, ValidationError

from yaptext.server.reference.openapi import document as openapi
from yaptext.server.send_queue import LINK, WRITE_NOW
from yaptext.wire.asyncapi import document as asyncapi

_WS, _HTTP = asyncapi(), openapi()
_CLOSES = _WS["channels"]["ws"]["x-close-codes"]
_ROOT = "#/components/schemas/"
_RESPONSES = "/v1/responses"


def _closed(node: Any) -> Any:
    """The schema without room for fields that it does not name: clients ignore those, the service must not send any."""
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    closed = {name: _closed(each) for name, each in node.items()}
    if "properties" in node and "type" in node:
        closed.setdefault("additionalProperties", False)
    return closed


@cache
def _validator(schema: str, *, ws: bool, closed: bool = True) -> Any:
    components = (_WS if ws else _HTTP)["components"]["schemas"]
    known = {"schemas": _closed(components) if closed else components}
    return Draft202012Validator(json.loads(schema) | {"components": known})


def fault_of(frame: Any) -> str | None:
    """What a frame of the service has that its document does not allow."""
    tag = frame.get("type") if isinstance(frame, dict) else None
    if tag not in (_name(it["$ref"]) for it in _sent()):
        return f"the service sends no frame of type {tag!r}"
    return _fault(_WS["components"]["messages"][tag]["payload"], frame, ws=True)


@cache
def _sent() -> list[dict[str, str]]:
    operations = _WS["operations"].values()
    replies = [
        it["messages"] if it["action"] == "send" else it.get("reply", {}).get("messages", []) for it in operations
    ]
    return [ref for refs in replies for ref in refs]


def _fault(schema: dict[str, Any], found: Any, *, ws: bool = False, closed: bool = True) -> str | None:
    try:
        _validator(json.dumps(schema), ws=ws, closed=closed).validate(found)
    except ValidationError as error:
        return f"{error.message} at {'/'.join(map(str, error.instance_path))} of {json.dumps(found)[:500]}"
    return None


def body_fault(name: str, body: Any) -> str | None:
    """What a body has that the schema of this name does not allow."""
    return _fault({"$ref": f"{_ROOT}{name}"}, body)


def _name(ref: str) -> str:
    return ref.rpartition("/")[2]


class Documented:
    """An ASGI app that passes everything on to another one. `faults` has what the documents do not allow."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.faults: list[str] = []
        self.seen: Counter[str] = Counter()
        """Frames by type, responses by route and status."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket" and scope["path"] in ("/ws", "/v1", _RESPONSES):
            await _Socket(self, scope, send).run(self._app, receive)
        elif scope["type"] == "http" and (route := _route(scope["path"])) is not None:
            await _Exchange(self, scope, route, receive, send).run(self._app)
        else:
            await self._app(scope, receive, send)

    def note(self, what: str, fault: str | None) -> None:
        self.seen[what] += 1
        if fault is not None:
            self.faults.append(f"{what}: {fault}")


class _Socket:
    def __init__(self, documented: Documented, scope: Any, send: Any) -> None:
        self._documented, self._send = documented, send
        self._path = "/ws" if scope["path"] == "/ws" else _RESPONSES
        self._write = scope.get("extensions", {}).get(WRITE_NOW)
        more = {} if self._write is None else {WRITE_NOW: self._write_now}
        self._scope = scope | {"extensions": scope.get("extensions", {}) | more}
        self._refusal = b""

    async def run(self, app: Any, receive: Any) -> None:
        await app(self._scope, receive, self._pass_on)

    def _write_now(self, frame: bytes) -> bool:
        written: bool = self._write(frame)
        if written:
            self._check(frame)
        return written

    async def _pass_on(self, event: Any) -> None:
        match event["type"]:
            case "websocket.send":
                self._check(event["text"])  # of bytes there are none
            case "websocket.close":
                code = event.get("code", 1000)
                codes = (
                    _CLOSES if self._path == "/ws" else _HTTP["paths"][self._path]["post"]["x-websocket"]["closeCodes"]
                )
                fault = None if str(code) in codes else "is not in the document"
                self._documented.note(f"close {code}", fault)
            case "websocket.http.response.start":
                known = {"503"} if self._path == "/ws" else _HTTP["paths"][self._path]["post"]["responses"]
                fault = None if str(event["status"]) in known else "is not in the document"
                self._documented.note(f"refusal {event['status']}", fault)
            case "websocket.http.response.body":
                self._refusal += event["body"]
                if not event.get("more_body"):
                    self._check(self._refusal, refused=True)
        await self._send(event)

    def _check(self, text: str | bytes, *, refused: bool = False) -> None:
        frame = json.loads(text)
        if self._path == "/ws":
            fault = fault_of(frame)
        elif refused:
            fault = body_fault("OpenAIError", frame)
        else:
            fault = _fault(_HTTP["paths"][self._path]["post"]["x-websocket"]["send"]["schema"], frame)
        self._documented.note(f"frame {frame.get('type')}", fault)


def _route(path: str) -> str | None:
    """The path of the document that a request is for."""
    if path in _HTTP["paths"]:
        return path
    return "/v1/models/{name}" if path.startswith("/v1/models/") else None


class _Exchange:
    """One request with its response."""

    def __init__(self, documented: Documented, scope: Any, route: str, receive: Any, send: Any) -> None:
        self._documented, self._receive, self._send = documented, receive, send
        self._method, self._route = scope["method"].lower().replace("head", "get"), route
        self._head = scope["method"] == "HEAD"
        self._asked, self._body, self._status, self._whole = b"", b"", 0, False
        self._headers: dict[str, str] = {}
        link = scope.get("extensions", {}).get(LINK)
        self._link = link
        more = {}
        if link is not None:
            more = {LINK: SimpleNamespace(admit=link.admit, abort=link.abort, write_now=self._write_now)}
        self._scope = scope | {"extensions": scope.get("extensions", {}) | more}

    async def run(self, app: Any) -> None:
        try:
            await app(self._scope, self._take, self._pass_on)
        finally:
            if self._status:
                self._documented.note(f"{self._method} {self._route} {self._status}", self._fault())

    async def _take(self) -> Any:
        event = await self._receive()
        self._asked += event.get("body", b"")
        return event

    def _write_now(self, part: bytes) -> bool:
        written: bool = self._link.write_now(part)
        self._body += part if written else b""
        return written

    async def _pass_on(self, event: Any) -> None:
        if event["type"] == "http.response.start":
            self._status = event["status"]
            self._headers = {name.decode().lower(): value.decode() for name, value in event.get("headers", [])}
        elif event["type"] == "http.response.body":
            self._body += event.get("body", b"")
            self._whole = not event.get("more_body", False)
        await self._send(event)

    def _fault(self) -> str | None:
        operation = _HTTP["paths"][self._route].get(self._method)
        if operation is None:
            # 404 of a name that no route takes, as with a line break
            return None if self._status in (404, 405) else "the document has no such method"
        answer = operation["responses"].get(str(self._status))
        if answer is None:
            return "the document has no such status"
        named = {name.lower() for name in answer.get("headers", {})}
        for name in ("retry-after", "retry-after-ms", "etag", "cache-control"):
            if name in self._headers and name not in named and not self._streams:
                return f"the document has no header {name}"
        if self._status == 429 and not named & set(self._headers):
            return "nothing says when to come back"
        return self._fault_of_body(operation, answer)

    @property
    def _streams(self) -> bool:
        return self._media == "text/event-stream"

    @property
    def _media(self) -> str:
        return self._headers.get("content-type", "").partition(";")[0]

    def _fault_of_body(self, operation: Any, answer: Any) -> str | None:
        content = answer.get("content", {})
        if not content:
            return "a body that is not documented" if self._body else None
        if self._media not in content:
            return f"the document has no {self._media!r}"
        if self._head or (not self._whole and not self._streams):
            return None  # the client left
        schema = content[self._media]["schema"]
        if self._streams:
            data = schema["properties"]["data"]["anyOf"][1]["contentSchema"]
            fault = next(filter(None, (_fault(data, event) for event in _events(self._body))), None)
        elif self._media == "application/json":
            fault = _fault(schema, json.loads(self._body))
        else:
            fault = None
        body = operation.get("requestBody")
        if fault is None and body is not None and self._status == 200:
            try:
                asked = json.loads(self._asked)
                fault = _fault(body["content"]["application/json"]["schema"], asked, closed=False)
            except ValueError:  # a field that is skipped may be no JSON, or no UTF-8
                return None
            return fault and f"a request that is not documented was served: {fault}"
        return fault


def _events(stream: bytes) -> list[Any]:
    """The data of the whole events of a stream."""
    lines = b"\n".join(stream.split(b"\n\n")[:-1]).split(b"\n")
    found = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
    return [json.loads(data) for data in found if data != b"[DONE]"]
