"""How a body of `/v1/responses` becomes one of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from sys import getsizeof
from typing import Any

from msgspec.structs import replace

from yaptext.dialogue.kept import Kept
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.transcript import keep_recent
from yaptext.errors import BadMessage
from yaptext.server.openai.request import HEARD_CHARS, latest, text_of
from yaptext.server.openai.responses_schema import LOGPROBS, Item, ResponsesRequest
from yaptext.server.openai.schema import (
    ChatRequest,
    Function,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ToolCall,
)

_MOST_CALLS = 64
"""Calls of one message; others are never used."""


def messages_of(runtime: Runtime, body: ResponsesRequest, before: Kept | None) -> list[Message]:
    """The conversation up to the request, without `instructions`. Raises `BadMessage`, `TextTooLong`."""
    given = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input or ()
    new = [_in_text(message) for message in _messages(latest(runtime, given, _is_system))]
    if before is None:
        return new
    known = list(before.messages)
    if known and new and known[-1].role == new[0].role == "assistant":
        # LiveKit repeats the reply that it got, or the part of it that was heard.
        last, first = known[-1], new[0]
        if last.tool_calls and first.tool_calls:
            new[0] = last if _ids(first) <= _ids(last) else first
            known.pop()
        elif not first.tool_calls and _is_beginning(text_of(first), text_of(last)):
            known.pop()
    return known + new


def _is_beginning(heard: str, sent: str) -> bool:
    return len(heard) <= HEARD_CHARS and "".join(sent.split()).startswith("".join(heard.split()))


def sent_text(before: Kept | None) -> str:
    """The reply that a conversation ends with."""
    last = before.messages[-1] if before is not None and before.messages else None
    return text_of(last) if last is not None and last.role == "assistant" else ""


def chat_request(body: ResponsesRequest, messages: Sequence[Message]) -> ChatRequest:
    """Raises `BadMessage`."""
    for name in ("background", "conversation"):
        if getattr(body, name):
            raise BadMessage(f"{name} is not supported - at $.{name}")
    for index, tool in enumerate(body.tools or ()):
        if tool.get("type", "function") != "function":
            given = str(tool["type"])[:40]
            raise BadMessage(f"the type of a tool is {given!r}; allowed is 'function' - at $.tools[{index}].type")
    head = [Message("system", body.instructions)] if body.instructions else []
    if not messages and not head:
        raise BadMessage("there is no input, and there are no instructions - at $.input")
    choice, wanted = body.tool_choice, body.text.format if body.text is not None else None
    return ChatRequest(
        messages=[*head, *messages],
        model=body.model,
        tools=body.tools,
        tool_choice=choice if choice is None or isinstance(choice, str) else NamedTool(NamedFunction(choice.name)),
        response_format=None if wanted is None else _format(wanted.type, wanted.schema, wanted.name),
        temperature=body.temperature,
        top_p=body.top_p,
        max_completion_tokens=body.max_output_tokens,
        logprobs=LOGPROBS in (body.include or ()),
        top_logprobs=body.top_logprobs if LOGPROBS in (body.include or ()) else None,
        user=body.user,
        prompt_cache_key=body.prompt_cache_key,
        metadata=body.metadata,
    )


def kept(messages: Sequence[Message], most_bytes: int, session_ids: frozenset[str]) -> Kept:
    """A conversation to continue: its end within `most_bytes`, with its system messages."""
    first = keep_recent([_size(message) for message in messages], most_bytes)
    head = [message for message in messages[:first] if message.role in ("system", "developer")]
    left = (*head, *messages[first:])
    return Kept(session_ids, left, sum(map(_weight, left)))


def _format(kind: str, schema: dict[str, object] | None, name: str) -> ResponseFormat:
    if kind == "json_schema" and schema is None:
        raise BadMessage("Object missing required field `schema` - at $.text.format")
    return ResponseFormat(kind, None if schema is None else JsonSchema(schema, name))  # type: ignore[arg-type]


def _messages(items: Iterable[Item]) -> Iterable[Message]:
    """Calls in a row are one message, as is a text with the calls after it."""
    last: Message | None = None
    for index, item in enumerate(items):
        if item.type == "function_call":
            call = ToolCall(item.call_id or "", Function(item.name or "", item.arguments))
            if last is not None and last.role == "assistant":
                last = replace(last, tool_calls=[*(last.tool_calls or ()), call][:_MOST_CALLS])
            else:
                if last is not None:
                    yield last
                last = Message("assistant", tool_calls=[call])
            continue
        if last is not None:
            yield last
            last = None
        if item.type == "function_call_output":
            yield Message("tool", item.output, tool_call_id=item.call_id)
        elif item.type == "message":
            if item.role is None:
                raise BadMessage(f"a message has no role - at $.input[{index}].role")
            last = Message(item.role, item.content)
        elif item.type != "reasoning":
            allowed = "message, function_call, function_call_output, reasoning"
            raise BadMessage(f"an item is {item.type[:40]!r}; allowed are {allowed} - at $.input[{index}].type")
    if last is not None:
        yield last


def _in_text(message: Message) -> Message:
    """Of a content only the text is kept. Raises as `text_of`: later, a response has begun."""
    return message if isinstance(message.content, str | None) else replace(message, content=text_of(message))


def _ids(message: Message) -> set[str]:
    return {call.id for call in message.tool_calls or ()}


def _size(message: Message) -> int:
    called = sum(len(call.function.arguments or "") + len(call.function.name) for call in message.tool_calls or ())
    return len(text_of(message)) + called + 64


def _weight(message: Message) -> int:
    """Bytes that it takes in memory, about."""
    texts: list[str | Any] = [message.content, message.name, message.tool_call_id]
    for call in message.tool_calls or ():
        texts += [call.id, call.function.name, call.function.arguments]
    return sum(map(getsizeof, texts)) + 100 + 150 * len(message.tool_calls or ())


def _is_system(item: Item) -> bool:
    return item.role in ("system", "developer") and bool(item.content)
