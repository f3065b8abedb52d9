"""What a turn of `/v1/chat/completions` is answered with: chunks of an event stream, or one object."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from yaptext.wire.frames import Done, IdentifiedCall, ServerMessage, Token, ToolCall, Usage

KEEP_ALIVE = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_REASONS = {"length": "length", "tool_calls": "tool_calls"}
"""Others (an end of the model's own, a soft limit, a timeout, a cancel) are `stop`."""


class Chunks:
    """The bodies of one completion. `one_call` leaves out all calls but the first (`parallel_tool_calls`)."""

    def __init__(self, model: str, *, with_usage: bool, one_call: bool) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._with_usage, self._one_call = with_usage, one_call
        chunk = self._chunk({"content": "?"}, None)
        self._before, self._after = chunk.split(b'"?"')

    def of(self, message: ServerMessage) -> bytes:
        """The events of a message of the turn; nothing for those that this dialect does not have."""
        if isinstance(message, Token):  # once a token: the rest of the chunk is always the same
            return self._before + msgspec.json.encode(message.text) + self._after
        if isinstance(message, ToolCall):
            return b"".join(map(self._call, range(len(message.raw)), self._calls(message.raw)))
        if isinstance(message, Done):
            usage = b""
            if self._with_usage:
                usage = _event(
                    self._head | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(message.usage)}
                )
            return self._chunk({}, _reason(message)) + usage + DONE
        return b""

    def first(self, *, calls: bool) -> bytes:
        """Before the first of the others. A reply that is calls has no content."""
        return self._chunk({"role": "assistant", "content": None if calls else ""}, None)

    def whole(self, text: str, calls: Sequence[IdentifiedCall], done: Done) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [_call_of(call) for call in self._calls(calls)]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(done)}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": _usage(done.usage)}

    def _calls(self, calls: Sequence[IdentifiedCall]) -> Sequence[IdentifiedCall]:
        return calls[:1] if self._one_call else calls

    def _call(self, index: int, call: IdentifiedCall) -> bytes:
        return self._chunk({"tool_calls": [{"index": index} | _call_of(call)]}, None)

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._with_usage else {}
        return _event(self._head | {"object": "chat.completion.chunk", "choices": [choice]} | usage)


def _event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _reason(done: Done) -> str:
    return _REASONS.get(str(done.finish_reason), "stop")


def _call_of(call: IdentifiedCall) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.arguments).decode()
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _usage(usage: Usage | Any) -> dict[str, Any]:
    """The decision's tokens count if no reply was made."""
    if not isinstance(usage, Usage):
        usage = Usage()
    prompt = usage.prompt_tokens or usage.tool_prompt_tokens
    cached = usage.cached_tokens if usage.prompt_tokens else usage.tool_cached_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": prompt + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
