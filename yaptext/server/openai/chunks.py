"""What a turn of `/v1/chat/completions` is answered with: chunks of an event stream, or one object."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from yaptext.server.openai import errors
from yaptext.server.openai.logprobs import Logprobs
from yaptext.server.openai.usage import tokens_of
from yaptext.wire.frames import Done, Error, IdentifiedCall, Token

_REASONS = {"length": "length", "tool_calls": "tool_calls"}
"""Others (an end of the model's own, a soft limit, a timeout, a cancel) are `stop`."""


class Chunks:
    """The events of one completion."""

    numbered = False

    def __init__(self, model: str, *, with_usage: bool, one_call: bool, top_logprobs: int | None) -> None:
        self.top_logprobs = top_logprobs
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._with_usage, self.one_call = with_usage, one_call
        self._begun = False
        self._before, self._after = self._chunk({"content": "?"}, None).split(b'"?"')

    def begin(self) -> Iterable[bytes]:
        return ()

    def text_begins(self) -> Iterable[bytes]:
        self._begun = True
        yield self._chunk({"role": "assistant", "content": ""}, None)

    def token(self, token: Token) -> bytes:
        return self._before + msgspec.json.encode(token.text) + self._after

    def calls(self, calls: Sequence[IdentifiedCall]) -> Iterable[bytes]:
        self._begun = True
        yield self._chunk({"role": "assistant", "content": None}, None)
        for index, call in enumerate(calls):
            yield self._chunk({"tool_calls": [{"index": index} | _call_of(call)]}, None)

    def done(self, done: Done, text: str, logprobs: Logprobs | None) -> Iterable[bytes]:
        if not self._begun:
            yield from self.text_begins()
        yield self._chunk({}, _reason(done), logprobs)
        if self._with_usage:
            yield _event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(done)})
        yield b"data: [DONE]\n\n"

    def failed(self, error: Error, text: str) -> Iterable[bytes]:
        yield _event(errors.body_of(error))

    def whole(
        self, text: str, calls: Sequence[IdentifiedCall], done: Done, logprobs: Logprobs | None
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [_call_of(call) for call in calls]
        choice = {"index": 0, "message": message, "logprobs": _content(logprobs), "finish_reason": _reason(done)}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": _usage(done)}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None, logprobs: Logprobs | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": _content(logprobs), "finish_reason": finish_reason}
        usage = {"usage": None} if self._with_usage else {}
        return _event(self._head | {"object": "chat.completion.chunk", "choices": [choice]} | usage)


def _event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _content(logprobs: Logprobs | None) -> dict[str, Any] | None:
    return None if logprobs is None else {"content": logprobs, "refusal": None}


def _reason(done: Done) -> str:
    return _REASONS.get(str(done.finish_reason), "stop")


def arguments_of(call: IdentifiedCall) -> str:
    return msgspec.json.encode(call.arguments).decode()


def _call_of(call: IdentifiedCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments_of(call)}}


def _usage(done: Done) -> dict[str, Any]:
    tokens = tokens_of(done)
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.total,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
        "completion_tokens_details": {"reasoning_tokens": tokens.reasoning},
    }
