"""What a turn of `/v1/responses` is answered with: events, or one object."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from yaptext.server.openai.chunks import arguments_of
from yaptext.server.openai.logprobs import Logprobs
from yaptext.server.openai.responses_schema import LOGPROBS, ResponsesRequest
from yaptext.server.openai.said import HOLE
from yaptext.server.openai.usage import tokens_of
from yaptext.wire.frames import Done, Error, IdentifiedCall, Token

_TEXT = "response.output_text"
_CODES = {"rate_limited": "rate_limit_exceeded", "bad_message": "invalid_prompt", "text_too_long": "invalid_prompt"}
"""Of errors that end a response; others are `server_error`."""


def as_frame(kind: str, event: bytes) -> bytes:
    return event


def as_sse(kind: str, event: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), event)


class Events:
    """The events of one response, each written by `form`."""

    numbered = True

    def __init__(self, body: ResponsesRequest, form: Callable[[str, bytes], bytes]) -> None:
        self.id = f"resp_{secrets.token_hex(12)}"
        self._form = form
        self.top_logprobs = (body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else None
        self._message_id = f"msg_{secrets.token_hex(12)}"
        self.one_call = body.parallel_tool_calls is False
        self._has_limit = body.max_output_tokens is not None
        choice = body.tool_choice
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model or "chat",
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "parallel_tool_calls": not self.one_call,
            "tool_choice": "auto" if choice is None else choice,
            "tools": body.tools or [],
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "store": body.store is not False,
        }
        self._texts = False
        self._items: list[dict[str, Any]] = []
        delta = self._event(f"{_TEXT}.delta", self._place | {"delta": "?", "logprobs": []})
        self._before, self._after = delta.split(b'"?"')

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def begin(self) -> Iterable[bytes]:
        response = self._response("in_progress", None)
        yield self._event("response.created", {"response": response})
        yield self._event("response.in_progress", {"response": response})

    def text_begins(self) -> Iterable[bytes]:
        self._texts = True
        item = self._message("", "in_progress") | {"content": []}
        yield self._event("response.output_item.added", {"output_index": 0, "item": item})
        yield self._event("response.content_part.added", self._place | {"part": _part("")})

    def token(self, token: Token) -> bytes:
        return self._before + msgspec.json.encode(token.text) + self._after

    def calls(self, calls: Sequence[IdentifiedCall]) -> Iterable[bytes]:
        for index, item in enumerate(self._calls(calls)):
            arguments, place = item["arguments"], {"item_id": item["id"], "output_index": index}
            added = item | {"arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", {"output_index": index, "item": added})
            kind = "response.function_call_arguments"
            yield self._event(f"{kind}.delta", place | {"delta": arguments})
            yield self._event(f"{kind}.done", place | {"name": item["name"], "arguments": arguments})
            yield self._event("response.output_item.done", {"output_index": index, "item": item})

    def done(self, done: Done, text: str, logprobs: Logprobs | None) -> Iterable[bytes]:
        response = self._ended(done, text, logprobs)
        yield from self._text_ends(text, response["output"][0]["status"] if response["output"] else "", logprobs)
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        yield self._event(kind, {"response": response})

    def failed(self, error: Error, text: str) -> Iterable[bytes]:
        yield from self._text_ends(text, "incomplete")
        code, message = _CODES.get(error.error_code, "server_error"), error.message.partition(" - at $.")[0]
        output = [self._message(text, "incomplete")] if self._texts else self._items
        response = self._response("failed", None, output) | {"error": {"code": code, "message": message}}
        yield self._event("response.failed", {"response": response})

    def whole(
        self, text: str, calls: Sequence[IdentifiedCall], done: Done, logprobs: Logprobs | None
    ) -> dict[str, Any]:
        self._calls(calls)
        self._texts = not calls
        return self._ended(done, text, logprobs)

    # --- parts

    def _event(self, kind: str, content: dict[str, Any]) -> bytes:
        return self._form(kind, b'{"type":"%b",%b,%b' % (kind.encode(), HOLE, msgspec.json.encode(content)[1:]))

    def _text_ends(self, text: str, status: str, logprobs: Logprobs | None = None) -> Iterable[bytes]:
        if not self._texts:
            return
        yield self._event(f"{_TEXT}.done", self._place | {"text": text, "logprobs": logprobs or []})
        yield self._event("response.content_part.done", self._place | {"part": _part(text, logprobs)})
        item = self._message(text, status, logprobs)
        yield self._event("response.output_item.done", {"output_index": 0, "item": item})

    def _ended(self, done: Done, text: str, logprobs: Logprobs | None) -> dict[str, Any]:
        """The response as its turn ended. That a reply came to the service's own limit does not make it incomplete."""
        cut = done.finish_reason == "length" and self._has_limit
        status = "cancelled" if done.cancelled is True else "incomplete" if cut else "completed"
        output = [self._message(text, "completed" if status == "completed" else "incomplete", logprobs)]
        response = self._response(status, done, output if self._texts else self._items)
        return response | ({"incomplete_details": {"reason": "max_output_tokens"}} if cut else {})

    def _response(self, status: str, done: Done | None, output: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        ends = {"status": status, "error": None, "incomplete_details": None, "output": output}
        return self._head | ends | {"usage": None if done is None else _usage(done)}

    def _message(self, text: str, status: str, logprobs: Logprobs | None = None) -> dict[str, Any]:
        message = {"id": self._message_id, "type": "message", "role": "assistant", "status": status}
        return message | {"content": [_part(text, logprobs)]}

    def _calls(self, calls: Sequence[IdentifiedCall]) -> list[dict[str, Any]]:
        self._items = [
            {
                "id": f"fc_{secrets.token_hex(12)}",
                "type": "function_call",
                "status": "completed",
                "call_id": call.id,
                "name": call.name,
                "arguments": arguments_of(call),
            }
            for call in calls
        ]
        return self._items


def _part(text: str, logprobs: Logprobs | None = None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _usage(done: Done) -> dict[str, Any]:
    tokens = tokens_of(done)
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.total,
    }
