"""The tool model's prompts as token ids: a fixed head that tells of the tools, recent history, the utterance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import msgspec

from yaptext.dialogue.history import Message, keep_recent
from yaptext.dialogue.prompt import Shape, in_roles, learn_shape
from yaptext.dialogue.toolset import ToolSet
from yaptext.engine.base import Codec
from yaptext.wire.messages import Call

_INSTRUCTION = """\
You decide whether the user's last message asks for one of these tools. Answer with a JSON list of calls, \
for example [{"name":"NAME","arguments":{...}}]. Answer [] when the message is talk or a question that \
needs no tool. Tools:
"""
_TALK = (
    "How are you today?",
    "Why is the sky blue?",
    "Tell me about your day",
    "I had a long day at work",
    "Who wrote Hamlet?",
    "Good morning!",
    "Tell me a story",
    "I am so happy",
    "What is the largest planet?",
    "Thanks, bye",
)
"""Messages that call for nothing: one stands before each of the tools' own examples, or a small model learns from
them that every message is a call."""


class ToolPrompts:
    """Builds the tool model's prompts. `history_tokens` bounds what they tell of the talk before."""

    def __init__(self, codec: Codec, history_tokens: int) -> None:
        self._codec, self._history_tokens = codec, history_tokens
        self._heads: OrderedDict[bytes, _Head] = OrderedDict()

    async def turn(self, tools: ToolSet, messages: Sequence[Message], utterance: str) -> list[int]:
        """The whole prompt of one decision."""
        head = self._heads.get(tools.key)
        if head is None:
            head = self._heads[tools.key] = await _learn_head(self._codec, tools)
            if len(self._heads) > 64:
                self._heads.popitem(last=False)
        else:
            self._heads.move_to_end(tools.key)
        recent = await self._recent(messages, head.labels)
        if head.labels:
            ids = head.ids + [token for message in recent for token in message.ids["tool as text"]]
            return ids + await self._codec.encode(f"Message: {utterance}") + head.shape.closing
        told, role = in_roles(head.shape, recent, "tool")
        if recent:  # the head already opens the first message
            told = told[len(head.shape.after_system) :] + head.shape.joint(role, "user")
        return head.ids + told + await self._codec.encode(utterance) + head.shape.closing

    async def _recent(self, messages: Sequence[Message], labels: bool) -> list[Message]:
        """The last whole messages within the limit, beginning with the user's."""
        key = "tool as text" if labels else "tool"
        recent = [m for m in messages[-16:] if m.speaker != "note"]
        new = [message for message in recent if key not in message.ids]
        texts = [message.text.strip() for message in new]
        if labels:
            texts = [f"{message.speaker.capitalize()}: {text}\n" for message, text in zip(new, texts, strict=True)]
        for message, ids in zip(new, await self._codec.encode_all(texts), strict=True):
            message.ids[key] = ids
        recent = recent[keep_recent([len(m.ids[key]) for m in recent], self._history_tokens) :]
        while recent and recent[0].speaker != "user":
            recent = recent[1:]
        return recent


@dataclass(frozen=True, slots=True)
class _Head:
    """The fixed beginning of a tool prompt. `labels` says that history is told as labelled text in one user
    message (the general instruction), not in the template's roles."""

    ids: list[int]
    shape: Shape
    labels: bool


async def _learn_head(codec: Codec, tools: ToolSet) -> _Head:
    probe = [{"role": "user", "content": "hello"}]
    functions = [{"type": "function", "function": tool} for tool in tools.tools]
    native = codec.render(probe, functions)
    if native is not None and native != codec.render(probe):
        shape = await learn_shape(codec, functions)
        if shape is not None:
            return _Head(shape.opening, shape, labels=False)
    signatures = (
        f"{tool['name']}({', '.join(tool['parameters'].get('properties', {}))}): {tool['description']}"
        for tool in tools.tools
    )
    instruction = await codec.encode(_INSTRUCTION + "\n".join(signatures))
    shape = await learn_shape(codec)
    if shape is None:
        newline, *pieces = [await codec.encode(text) for text in ("\n", "\n\n", "\nCalls: ", "\n", "\nCalls: ")]
        bare = Shape(newline, [], *pieces)
        return _Head(instruction + await _shots(codec, bare, tools), bare, labels=True)
    return _Head(shape.opening + instruction + await _shots(codec, shape, tools), shape, labels=True)


async def _shots(codec: Codec, shape: Shape, tools: ToolSet) -> list[int]:
    """The tools' examples and as many of plain talk as earlier exchanges, up to where the next message opens."""
    ids = list(shape.after_system)
    for talk, (message, calls) in zip(cycle(_TALK), tools.examples, strict=False):
        for said, answer in ((talk, []), (message, calls)):
            ids += await codec.encode(f"Message: {said}") + shape.after_user
            ids += await codec.encode(dumps(answer)) + shape.after_reply
    return ids


def dumps(calls: list[Call]) -> str:
    """Calls as the grammar lets the model write them."""
    return msgspec.json.encode(calls).decode()
