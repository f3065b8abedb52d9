"""The tool model's prompts as token ids: a fixed head that describes the tools, recent history, the utterance."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import msgspec
from cachetools import LRUCache

from yaptext.dialogue.layout import Layout, disguised
from yaptext.dialogue.talk import Line, Role, Said, Talk
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import Message, in_lines, keep_recent
from yaptext.engine.base import Codec
from yaptext.wire.frames import Call

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
_KEPT_HEADS = 64
_WORDS = re.compile(r"[A-Za-z0-9]{3,}")


class ToolPrompts:
    """Builds the tool model's prompts. `history_tokens` bounds what they hold of the talk before."""

    def __init__(self, codec: Codec, history_tokens: int) -> None:
        self._codec, self.history_tokens = codec, history_tokens
        self._heads: LRUCache[bytes, Head] = LRUCache(_KEPT_HEADS)

    async def turn(
        self, tools: ToolSet, messages: Sequence[Message], utterance: str, results: Sequence[str] = ()
    ) -> list[int]:
        """The whole prompt of one decision. `results` are of the calls that were made for this utterance."""
        head = await self.head(tools)
        return await head.layout.ids(head.talk(await self.recent(messages, head), utterance, results))

    async def prefix(self, tools: ToolSet, messages: Sequence[Message]) -> list[int]:
        """What the next decision's prompt begins with."""
        head = await self.head(tools)
        recent = await self.recent(messages, head)
        if recent and recent[-1].speaker != "assistant":
            recent = recent[:-1]  # may come to stand in one message with what follows
        return await head.layout.prefix([head.talk(recent, text) for text in ("One", "two", "3")])

    async def head(self, tools: ToolSet) -> Head:
        """What stands before the talk, learned once for each set of tools and day."""
        head = self._heads.get(tools.key)
        if head is None or head.layout.day != self._codec.day:
            head = self._heads[tools.key] = await Head.learn(self._codec, tools)
        return head

    async def recent(self, messages: Sequence[Message], head: Head) -> list[Message]:
        """The last whole messages within the limit, beginning with the user's or with text without a speaker."""
        recent = list(messages[-16:])
        sizes = await head.layout.measure([(head.role(message), head.line(message)) for message in recent])
        recent = recent[keep_recent(sizes, self.history_tokens) :]
        while recent and recent[0].speaker in ("assistant", "tool"):
            recent = recent[1:]
        return recent


@dataclass(frozen=True, slots=True)
class Head:
    """The fixed beginning of a tool prompt. Either the template describes the tools, and `before` is empty; or an
    instruction does, and the talk stands as lines with `labels` in one user message. A model without a template is
    given all of it as `one_text`."""

    layout: Layout
    labels: bool
    before: Sequence[Said] = ()
    one_text: bool = False

    @classmethod
    async def learn(cls, codec: Codec, tools: ToolSet) -> Head:
        described = []
        for tool in tools.tools:
            described.append({"type": "function", "function": disguised(codec, tool)})
            await asyncio.sleep(0)  # many tools take milliseconds, here and below
        native = cls(await Layout.plain(codec, "tool"), labels=False)
        samples = [native.talk(messages, "Hi!") for messages in _samples()]
        layout = await Layout.learn(codec, "tool", samples, described)
        if layout is not None:
            return cls(layout, labels=False)
        signatures = (
            f"{tool['name']}({', '.join(tool['parameters'].get('properties', {}))}): {tool['description']}"
            for tool in tools.tools
        )
        instruction = Said("system", [Line((_INSTRUCTION + "\n".join(signatures)).strip(), {})])
        before = [instruction, *_shots(tools)]
        told = cls(native.layout, labels=True, before=before)
        layout = await Layout.learn(codec, "tool as text", [told.talk(messages, "Hi!") for messages in _samples()])
        if layout is not None:
            return replace(told, layout=layout)
        return replace(told, layout=await Layout.plain(codec, "tool as text"), one_text=True)

    @property
    def format(self) -> str:
        """`template`, `instruction`, or `bare` without a template."""
        return "bare" if self.one_text else "instruction" if self.labels else "template"

    def role(self, message: Message) -> Role | None:
        """In which it stands as a whole message, if it does."""
        return None if self.labels else "assistant" if message.speaker == "assistant" else "user"

    def line(self, message: Message) -> Line:
        line = message.lines.instruction if self.labels else message.lines.tool
        if line is None:
            text = message.text.strip()
            if self.labels:
                text = ("" if message.speaker == "note" else f"{message.speaker.capitalize()}: ") + in_lines(text)
            line = Line(text, {})
            if self.labels:
                message.lines.instruction = line
            else:
                message.lines.tool = line
        return line

    def talk(self, recent: Sequence[Message], utterance: str, results: Sequence[str] = ()) -> Talk:
        """The conversation that a decision's prompt renders."""
        utterance = "\n".join([utterance.strip(), *results])
        if not self.labels:
            said = [Said(role, [self.line(message)]) for message in recent if (role := self.role(message)) is not None]
            return [*said, Said("user", [Line(utterance, volatile=True)])]
        last = Line(f"Message: {in_lines(utterance)}".strip(), volatile=True)
        lines = [*(self.line(message) for message in recent), last]
        if self.one_text:
            shots = [line for said in self.before for line in said.lines]
            return [Said("user", [*shots, *lines[:-1], Line(f"{last.text}\nCalls:", volatile=True)])]
        return [*self.before, Said("user", lines)]


def _samples() -> list[list[Message]]:
    """Conversations as they come. Each has messages of its own, since those keep their token ids."""
    texts: tuple[list[str], ...] = (
        [],
        ["One?", "Two.", "3"],
        ["Really?!", "Yes: 7 x 8 = 56."],
        ["Really?!", "Yes: 7 x 8 = 56.", "So?", "Fine"],
    )
    return [[Message("assistant" if n % 2 else "user", text) for n, text in enumerate(talk)] for talk in texts]


def shows(prompt: str, tool: dict[str, Any]) -> bool:
    """Whether a prompt holds a tool's name and the words of its description, as some templates escape the rest."""
    return tool["name"] in prompt and all(word in prompt for word in _WORDS.findall(tool["description"]))


def _shots(tools: ToolSet) -> list[Said]:
    """The tools' examples and as many of plain talk as earlier exchanges."""
    said = []
    for talk, (message, calls) in zip(cycle(_TALK), tools.examples, strict=False):
        for text, answer in ((talk, []), (message, calls)):
            said += [
                Said("user", [Line(f"Message: {in_lines(text)}", {})]),
                Said("assistant", [Line(dumps(answer), {})]),
            ]
    return said


def dumps(calls: list[Call]) -> str:
    """Calls as the grammar lets the model write them."""
    return msgspec.json.encode(calls).decode()
