"""How a conversation becomes token ids: exactly those of what the chat template renders.

A tokenizer cuts a text at its control tokens and encodes each stretch between them by itself; a line that begins after
a newline is mostly independent, too. So a prompt can be put together from pieces that are encoded once. Whether that
gives the right ids is tried at the start with sample conversations; if not, each prompt is rendered and encoded whole.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from yaptext.dialogue.pieces import Pieces
from yaptext.dialogue.talk import Called, Line, Role, Rounds, Talk, in_turn
from yaptext.engine.base import Codec
from yaptext.errors import EngineFailed

_MARKED = [
    {"role": "system", "content": "MARKSYSTEM"},
    {"role": "user", "content": "MARKFIRST"},
    {"role": "assistant", "content": "MARKREPLY"},
    {"role": "user", "content": "MARKSECOND"},
]
"""A conversation whose contents are found again in what the template makes of it."""


class Layout:
    """The layout of one model's conversations in one role.

    `exact`: the ids are those of the rendered text; `stable`: what stands before a volatile line stays when more is
    said; `pieces`: prompts are put together from stretches; `system`: the template takes system messages. A reply ends
    at `stop_ids`, or, if the template marks its end by no control token, at the text `stop`. `calls`: the template
    shows calls of tools, and what they returned, in a form of its own.
    """

    def __init__(
        self, codec: Codec, kind: str, tools: list[dict[str, Any]] | None = None, *, thinking: bool = False
    ) -> None:
        """`kind` keeps the ids of different builders apart; `tools` are those that the template itself is to show;
        `thinking` is what its switch for that is set to."""
        self._codec, self._tools, self.asks_to_think = codec, tools, thinking
        self.thinking = codec.thinking(thinking)
        self.day = codec.day
        self.exact = self.stable = self.pieces = self.calls = False
        self.system = tools is None
        self.stop_ids: tuple[int, ...] = ()
        self.stop: tuple[str, ...] = ()
        self.is_plain = False
        self._pieces = Pieces(codec, kind)

    @classmethod
    async def learn(
        cls,
        codec: Codec,
        kind: str,
        samples: Sequence[Talk],
        tools: list[dict[str, Any]] | None = None,
        *,
        thinking: bool = False,
    ) -> Layout | None:
        """None if the template cannot render the samples, or loses what they say or a tool. The last two samples are a
        conversation that continues in two ways. Others have their turn between two renderings: each takes milliseconds
        with many tools."""
        layout = cls(codec, kind, tools, thinking=thinking)
        if not await layout._renders(samples):
            layout.system = False
            if tools is not None or not await layout._renders(samples):
                return None
        await layout._find_stops()
        layout.pieces = not codec.ticks and await layout._learn_pieces() and await layout._agrees(samples)
        layout.exact = True
        await asyncio.sleep(0)
        layout.calls = tools is None and layout._shows_calls()
        layout.stable = not codec.ticks and await layout._stays(samples[-2:])
        return layout

    @classmethod
    async def plain(cls, codec: Codec, kind: str) -> Layout:
        """Of a model without a template: one text, opened as the tokenizer opens any text."""
        layout = cls(codec, kind)
        layout.is_plain = layout.exact = layout.stable = True
        layout._pieces = Pieces(codec, kind, codec.leading)
        layout.pieces = await layout._pieces.breaks()
        return layout

    # --- what turns ask for

    @property
    def overhead(self) -> int:
        """Most tokens that the template itself puts around one message."""
        return self._pieces.overhead

    @property
    def opening(self) -> int:
        """Tokens before the first content."""
        return self._pieces.opening

    async def measure(self, lines: Sequence[tuple[Role | None, Line]], *, alone: bool = True) -> list[int]:
        """Tokens of each line: of one among others, or of a message in that role, or (not `alone`) its first line."""
        return await self._pieces.measure([(role if self.pieces else None, line) for role, line in lines], alone=alone)

    async def ids(self, talk: Talk, rounds: Rounds = ()) -> list[int]:
        """The whole prompt, ready for a reply; after `rounds` of calls only if the template shows them."""
        if self._fits(talk) and not rounds:
            return (await self._pieces.assemble(self._turns(talk)))[0]
        text = self.render(talk, rounds)
        if text is None:
            raise EngineFailed("The chat template refuses this conversation.")
        return await self.encode(text)

    async def encode(self, text: str) -> list[int]:
        """The ids of a rendered text, as the tokenizer reads it."""
        if self.is_plain:
            return [*self._codec.leading, *await self._codec.encode(text, place="start")]
        return await self._codec.encode_rendered(text)

    async def prefix(self, talks: Sequence[Talk]) -> list[int]:
        """The beginning of every later prompt. `talks` are different continuations of the conversation."""
        if self._fits(talks[0]) and self._pieces.are_cut:
            ids, stable = await self._pieces.assemble(self._turns(talks[0]))
            return ids[:stable]
        prompts = [await self.ids(talk) for talk in talks]
        same = 0
        for column in zip(*prompts, strict=False):
            if len(set(column)) > 1:
                break
            same += 1
        return prompts[0][: max(0, same - 1)]  # the last may be the same by chance

    def _fits(self, talk: Talk) -> bool:
        """Whether the pieces make the prompt. They begin as the samples did, with a system message if there is one."""
        return self.pieces and (self.is_plain or not self.system or talk[0].role == "system")

    def _turns(self, talk: Talk) -> Talk:
        return talk if self.is_plain else in_turn(talk, system=self.system)

    def render(self, talk: Talk, rounds: Rounds = ()) -> str | None:
        """The text of the prompt; control tokens in contents are disguised."""
        if self.is_plain:
            return talk[0].content
        messages: list[dict[str, Any]] = [
            {"role": said.role, "content": self._codec.disguise(said.content)} for said in self._turns(talk)
        ]
        return self._render([*messages, *self._called(rounds)])

    def _called(self, rounds: Rounds) -> list[dict[str, Any]]:
        """Calls and what they returned, as messages. Some templates want ids of nine letters and digits."""
        messages: list[dict[str, Any]] = []
        for number, calls in enumerate(rounds):
            ids = [f"c{number:04d}{index:04d}" for index in range(len(calls))]
            names = [self._codec.disguise(call.name) for call in calls]
            functions = [
                {"name": name, "arguments": disguised(self._codec, call.arguments)}
                for name, call in zip(names, calls, strict=True)
            ]
            asked = [
                {"id": id, "type": "function", "function": function}
                for id, function in zip(ids, functions, strict=True)
            ]
            messages.append({"role": "assistant", "content": "", "tool_calls": asked})
            messages += [
                {"role": "tool", "name": name, "tool_call_id": id, "content": self._codec.disguise(call.content)}
                for id, name, call in zip(ids, names, calls, strict=True)
            ]
        return messages

    def _shows_calls(self) -> bool:
        made = [[Called("lookup", {"query": "MARKQUERY"}, "MARKRESULT")]]
        told = self._render([*self._marked[:-2], *self._called(made)]) or ""
        places = [told.find(mark) for mark in ("MARKFIRST", "lookup", "MARKQUERY", "MARKRESULT")]
        return -1 not in places and places[0] < min(places[1:]) and places[3] == max(places)

    def _render(self, messages: list[dict[str, Any]], *, reply: bool = True) -> str | None:
        return self._codec.render(messages, self._tools, reply=reply, thinking=self.asks_to_think)

    # --- learning

    @property
    def _marked(self) -> list[dict[str, str]]:
        return _MARKED if self.system else _MARKED[1:]

    async def _renders(self, samples: Sequence[Talk]) -> bool:
        """Whether all that is said stands in the rendered text, and the name of every tool."""
        names = [tool["function"]["name"] for tool in self._tools or ()]
        for talk in samples:
            await asyncio.sleep(0)
            rendered = self.render(talk)
            if rendered is None:
                return False
            said = [self._codec.disguise(said.content.strip()) for said in self._turns(talk)]
            if any(text not in rendered for text in (*said, *names)):
                return False
        return True

    async def _learn_pieces(self) -> bool:
        """Learns what the template writes around contents, if they stand once and in order."""
        messages = self._marked
        marks = [message["content"] for message in messages]
        mark, text = "|".join(marks), self._render(messages) or ""
        if re.findall(mark, text) != marks:
            return False
        await self._pieces.learn(re.split(mark, text), [message["role"] for message in messages])
        return await self._pieces.breaks()

    async def _agrees(self, samples: Sequence[Talk]) -> bool:
        for talk in samples:
            await asyncio.sleep(0)
            rendered = self.render(talk)
            assert rendered is not None
            await asyncio.sleep(0)
            if await self._codec.encode_rendered(rendered) != (await self._pieces.assemble(self._turns(talk)))[0]:
                return False
        return True

    async def _stays(self, ways: Sequence[Talk]) -> bool:
        """Whether the whole conversation is in the prefix of its continuations."""
        ids, prefix = await self.ids(ways[0]), await self.prefix(ways)
        rest = self._codec.show(ids[len(prefix) :])
        standing = [line.text for said in ways[0] for line in said.lines if not line.volatile]
        return not any(text.partition("\n")[0][:12] in rest for text in standing)

    async def _find_stops(self) -> None:
        """What follows a reply ends it: the first control token, or else the next line of text."""
        texts = []
        for talk, ready in ((self._marked[:-1], False), (self._marked, True)):
            await asyncio.sleep(0)
            rendered = self._render(talk, reply=ready) or ""
            texts.append(rendered.partition("MARKREPLY")[2].partition("MARKSECOND")[0])
        last, between = texts
        found = []
        for text in (last, between):
            parts = self._codec.split(text.lstrip())
            if parts and isinstance(parts[0], int):
                found.append(parts[0])
        if self.thinking.on and len(found) == 2:
            found = found[:1]  # the other may end the thinking as well
        self.stop_ids = tuple(dict.fromkeys(found))
        if not found and (text := between.strip()):
            self.stop = (text.splitlines()[0],)


def disguised(codec: Codec, value: Any) -> Any:
    """Any JSON as a template may print it: nothing in it is a control token."""
    if isinstance(value, str):
        return codec.disguise(value)
    if isinstance(value, list):
        return [disguised(codec, item) for item in value]
    if isinstance(value, dict):
        return {codec.disguise(name): disguised(codec, item) for name, item in value.items()}
    return value
