"""How a conversation becomes token ids: exactly what the chat template renders and the tokenizer makes of that.

A tokenizer cuts a text at its control tokens and encodes each stretch between them by itself; a line that begins after
a newline is mostly independent, too. So a prompt can be put together from stretches that are encoded once. Whether that
gives the right ids is tried at the start with sample conversations; if not, each prompt is rendered and encoded whole.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, Literal

import msgspec

from yaptext.engine.base import Codec, Place
from yaptext.errors import EngineFailed

Role = Literal["system", "user", "assistant"]
Kept = dict[str, bytes]
"""Token ids of one line by where it stands, so that each is encoded once in its life, not once a turn."""
_MARKS = {"system": "MARKSYSTEM", "user": "MARKFIRST", "assistant": "MARKREPLY", "next": "MARKSECOND"}
_BREAKS = (
    "Alpha\nUser: beta?!\nAssistant: 12\n7 ...\nNow: \u2026\n<|history|>\nMessage: (\u4f60\u3002)\n(now) \U0001f642\nz"
)
"""Lines that end and begin as those of prompts do."""


class Line(msgspec.Struct, eq=False, gc=False):
    """One line of a message, or several, without white space at its ends. `kept` is where its ids are kept. What is
    `volatile` changes with every turn, and so does all that follows. A `loose` line is encoded together with the one
    before: some tokenizers read a newline and a slash as one.

    Not seen by the garbage collector, like messages: a thousand long transcripts made each of its rounds take 0.3 s."""

    text: str
    kept: Kept | None = None
    volatile: bool = False
    loose: bool = False
    size: int | None = None
    """Its tokens, once they were measured."""

    def __post_init__(self) -> None:
        first = self.text[:1]
        self.loose = not (first.isascii() and (first.isalnum() or first in ("<", "(")))


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a conversation, as lines."""

    role: Role
    lines: Sequence[Line]

    @property
    def content(self) -> str:
        return "\n".join(line.text for line in self.lines)


Conversation = Sequence[Said]


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a tool, and the text that it returned."""

    name: str
    arguments: dict[str, Any]
    content: str


Rounds = Sequence[Sequence[Called]]
"""Calls that were made for the last message of a conversation, those of each decision together."""


def in_turn(talk: Iterable[Said], *, system: bool) -> list[Said]:
    """The conversation as every template takes it: user and assistant alternate, the user first. Without `system` its
    text opens the first user message."""
    turns: list[Said] = []
    head: Said | None = None
    for said in talk:
        if said.role == "system":
            head = said
        elif turns and turns[-1].role == said.role:
            turns[-1] = Said(said.role, [*turns[-1].lines, *said.lines])
        elif not turns and said.role == "assistant":
            turns += [Said("user", [Line("")]), said]
        else:
            turns.append(said)
    if head is None:
        return turns
    if system:
        return [head, *turns]
    first, *rest = turns[0].lines
    apart = Line(f"\n{first.text}", volatile=first.volatile)
    return [Said("user", [*head.lines, apart, *rest]), *turns[1:]]


@dataclass(frozen=True, slots=True)
class Joint:
    """What a template writes between two contents: text that is encoded with the one before, control tokens, and text
    that is encoded with the one after. Without `control` there are no tokens, and all text is in `left`."""

    left: str
    ids: Sequence[int]
    right: str
    control: bool

    @classmethod
    async def learn(cls, codec: Codec, text: str, *, opening: bool = False) -> Joint:
        parts = codec.split(text)
        marks = [index for index, part in enumerate(parts) if isinstance(part, int)]
        if not marks:
            return cls("" if opening else text, (), text if opening else "", control=False)
        begin, end = marks[0], marks[-1] + 1
        left = "".join(str(part) for part in parts[:begin])
        ids: list[int] = []
        if opening:
            ids, left = (await codec.encode(left, place="start") if left else []), ""
        for part in parts[begin:end]:
            ids += [part] if isinstance(part, int) else await codec.encode(part, place="after")
        return cls(left, ids, "".join(str(part) for part in parts[end:]), control=True)


@dataclass(slots=True)
class _Stretch:
    """A text that is encoded by itself. `kept`, if one line alone is in it, holds its ids under `key`."""

    place: Place
    prefix: str
    text: str = ""
    suffix: str = ""
    kept: Kept | None = None
    lines: int = 0
    volatile: bool = False
    ids: Sequence[int] = ()

    def add(self, line: Line, between: str = "") -> None:
        self.text += self.suffix + between + line.text
        self.suffix = ""
        self.kept = None if self.lines else line.kept
        self.lines += 1
        self.volatile |= line.volatile


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
        self._codec, self._kind, self._tools, self.asks_to_think = codec, kind, tools, thinking
        self.thinking = codec.thinking(thinking)
        self.day = codec.day
        self.exact = self.stable = self.pieces = self.calls = False
        self.system = tools is None
        self.stop_ids: tuple[int, ...] = ()
        self.stop: tuple[str, ...] = ()
        self.is_plain = False
        self._joints: dict[tuple[str, str], Joint] = {}
        self._opening = self._closing = Joint("", (), "", control=False)

    @classmethod
    async def learn(
        cls,
        codec: Codec,
        kind: str,
        samples: Sequence[Conversation],
        tools: list[dict[str, Any]] | None = None,
        *,
        thinking: bool = False,
    ) -> Layout | None:
        """None where the template cannot render the samples, or loses what they say. The last two samples are one
        conversation that goes on in two ways. Others have their turn between two renderings: each takes milliseconds
        with many tools."""
        layout = cls(codec, kind, tools, thinking=thinking)
        if not await layout._renders(samples):
            layout.system = False
            if tools is not None or not await layout._renders(samples):
                return None
        await layout._find_stops()
        layout.pieces = not codec.ticks and await layout._find_joints() and await layout._agrees(samples)
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
        layout._opening = Joint("", codec.leading, "", control=False)
        layout.pieces = await layout._breaks()
        return layout

    # --- what turns ask for

    @property
    def overhead(self) -> int:
        """Most tokens that the template itself puts around one message."""
        return max((len(joint.ids) for joint in self._joints.values()), default=0 if self.is_plain else 8)

    @property
    def opening(self) -> int:
        """Tokens before the first content."""
        return len(self._opening.ids)

    async def measure(self, lines: Sequence[tuple[Role | None, Line]], *, alone: bool = True) -> list[int]:
        """Tokens of each line: of one among others, or of a message in that role, or (not `alone`) its first line."""
        new = [(role, line) for role, line in lines if line.size is None]
        stretches = []
        for role, line in new:
            stretch = self._usual(role, alone)
            stretch.text, stretch.kept = line.text, line.kept
            stretches.append(stretch)
        await self._encode(stretches)
        for (_, line), stretch in zip(new, stretches, strict=True):
            line.size = len(stretch.ids)
        return [line.size or 0 for _, line in lines]

    def _usual(self, role: Role | None, alone: bool) -> _Stretch:
        if not self.pieces or role is None:
            return _Stretch("inside", "", suffix="\n")
        if role == "system":
            after = self._joints["system", "user"].left if alone and self.system and not self.is_plain else "\n"
            return _Stretch("after" if self._opening.control else "start", self._opening.right, suffix=after)
        other = "assistant" if role == "user" else "user"
        before, following = self._joints[other, role], self._joints[role, other]
        return _Stretch("after" if before.control else "inside", before.right, suffix=following.left)

    async def ids(self, talk: Conversation, rounds: Rounds = ()) -> list[int]:
        """The whole prompt, ready for a reply; after `rounds` of calls only if the template shows them."""
        if self.pieces and not rounds:
            return (await self._assemble(talk))[0]
        text = self.render(talk, rounds)
        if text is None:
            raise EngineFailed("The chat template refuses this conversation.")
        return await self.encode(text)

    async def encode(self, text: str) -> list[int]:
        """The ids of a rendered text, as the tokenizer reads it."""
        if self.is_plain:
            return [*self._codec.leading, *await self._codec.encode(text, place="start")]
        return await self._codec.encode_rendered(text)

    async def prefix(self, talks: Sequence[Conversation]) -> list[int]:
        """What every later prompt begins with. `talks` go on from what stands, each in another way."""
        if self.pieces and all(joint.control for joint in self._joints.values()):
            ids, stable = await self._assemble(talks[0])
            return ids[:stable]
        prompts = [await self.ids(talk) for talk in talks]
        same = 0
        for column in zip(*prompts, strict=False):
            if len(set(column)) > 1:
                break
            same += 1
        return prompts[0][: max(0, same - 1)]  # the last may be the same by chance

    def render(self, talk: Conversation, rounds: Rounds = ()) -> str | None:
        """The text of the prompt; control tokens in contents are disguised."""
        if self.is_plain:
            return talk[0].content
        messages: list[dict[str, Any]] = [
            {"role": said.role, "content": self._codec.disguise(said.content)}
            for said in in_turn(talk, system=self.system)
        ]
        return self._render([*messages, *self._called(rounds)])

    def _called(self, rounds: Rounds) -> list[dict[str, Any]]:
        """Calls and what they returned, as messages. Some templates want ids of nine letters and digits."""
        messages: list[dict[str, Any]] = []
        for number, calls in enumerate(rounds):
            ids = [f"c{number:04d}{index:04d}" for index in range(len(calls))]
            functions = [{"name": call.name, "arguments": disguised(self._codec, call.arguments)} for call in calls]
            asked = [
                {"id": id, "type": "function", "function": function}
                for id, function in zip(ids, functions, strict=True)
            ]
            messages.append({"role": "assistant", "content": "", "tool_calls": asked})
            messages += [
                {"role": "tool", "name": call.name, "tool_call_id": id, "content": self._codec.disguise(call.content)}
                for id, call in zip(ids, calls, strict=True)
            ]
        return messages

    def _shows_calls(self) -> bool:
        messages, _ = self._marked()
        made = [[Called("lookup", {"query": "MARKQUERY"}, "MARKRESULT")]]
        told = self._render([*messages[:-2], *self._called(made)]) or ""
        places = [told.find(mark) for mark in (_MARKS["user"], "lookup", "MARKQUERY", "MARKRESULT")]
        return -1 not in places and places[0] < min(places[1:]) and places[3] == max(places)

    def _render(self, messages: list[dict[str, Any]], *, reply: bool = True) -> str | None:
        return self._codec.render(messages, self._tools, reply=reply, thinking=self.asks_to_think)

    # --- learning

    async def _renders(self, samples: Sequence[Conversation]) -> bool:
        """Whether all that is said stands in the rendered text, once."""
        for talk in samples:
            await asyncio.sleep(0)
            rendered = self.render(talk)
            if rendered is None:
                return False
            disguised = [self._codec.disguise(said.content.strip()) for said in in_turn(talk, system=self.system)]
            if any(content not in rendered for content in disguised):
                return False
        return True

    def _marked(self) -> tuple[list[dict[str, str]], list[str]]:
        talk = [
            {"role": "user", "content": _MARKS["user"]},
            {"role": "assistant", "content": _MARKS["assistant"]},
            {"role": "user", "content": _MARKS["next"]},
        ]
        if self.system:
            talk.insert(0, {"role": "system", "content": _MARKS["system"]})
        return talk, [message["content"] for message in talk]

    async def _find_joints(self) -> bool:
        """Learns the joints, where contents stand once and in order."""
        messages, marks = self._marked()
        pieces = split(self._render(messages), marks)
        if pieces is None:
            return False
        opening, *between, closing = pieces
        self._opening = await Joint.learn(self._codec, opening, opening=True)
        end = await Joint.learn(self._codec, closing)
        if end.right:  # nothing follows it
            end = replace(end, ids=[*end.ids, *await self._codec.encode(end.right, place="after")], right="")
        self._closing = end
        roles = [message["role"] for message in messages]
        for (before, after), text in zip(pairwise(roles), between, strict=True):
            self._joints[before, after] = await Joint.learn(self._codec, text)
        return await self._breaks()

    async def _breaks(self) -> bool:
        """Whether a line that begins after a newline is encoded as by itself."""
        lines = _BREAKS.split("\n")
        texts = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
        first, *rest = texts
        ids = [await self._codec.encode(first, place="start"), *await self._codec.encode_all(rest)]
        return list(chain.from_iterable(ids)) == await self._codec.encode(_BREAKS, place="start")

    async def _agrees(self, samples: Sequence[Conversation]) -> bool:
        for talk in samples:
            await asyncio.sleep(0)
            rendered = self.render(talk)
            assert rendered is not None
            await asyncio.sleep(0)
            if await self._codec.encode_rendered(rendered) != (await self._assemble(talk))[0]:
                return False
        return True

    async def _stays(self, ways: Sequence[Conversation]) -> bool:
        """Whether all that stands in a conversation is in the prefix of its ways to go on."""
        ids, prefix = await self.ids(ways[0]), await self.prefix(ways)
        rest = self._codec.show(ids[len(prefix) :])
        standing = [line.text for said in ways[0] for line in said.lines if not line.volatile]
        return not any(text.partition("\n")[0][:12] in rest for text in standing)

    async def _find_stops(self) -> None:
        """What follows a reply ends it: the first control token, or else the next line of text."""
        messages, _ = self._marked()
        reply = _MARKS["assistant"]
        texts = []
        for talk, ready in ((messages[:-1], False), (messages, True)):
            await asyncio.sleep(0)
            rendered = self._render(talk, reply=ready) or ""
            texts.append(rendered.partition(reply)[2].partition(_MARKS["next"])[0])
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

    # --- pieces

    async def _assemble(self, talk: Conversation) -> tuple[list[int], int]:
        """The ids, and how many of them stand before the first stretch with a volatile line."""
        turns = list(talk) if self.is_plain else in_turn(talk, system=self.system)
        parts: list[_Stretch | Sequence[int]] = [self._opening.ids]
        new: list[_Stretch] = []
        kind = self._kind
        stretch: _Stretch | None = None
        """Begun in an earlier message, if no control token stands between."""
        place: Place = "after" if self._opening.control else "start"
        prefix = self._opening.right
        first_volatile: int | None = None
        for said, following in zip(turns, [*turns[1:], None], strict=True):
            joint = self._closing if following is None else self._joints[said.role, following.role]
            lines, count = said.lines, len(said.lines)
            begin = 0
            while begin < count:
                end = begin + 1
                while end < count and lines[end].loose:
                    end += 1
                suffix = "\n" if end < count else joint.left
                line = lines[begin]
                if stretch is None and end == begin + 1 and (end < count or joint.control) and line.kept is not None:
                    known = line.kept.get(_where(kind, place, prefix, suffix))
                    if known is not None:
                        parts.append(memoryview(known).cast("I"))
                        begin, place, prefix = end, "inside", ""
                        continue
                if stretch is None:
                    stretch = _Stretch(place, prefix)
                    stretch.add(line)
                else:
                    stretch.add(line, "" if not begin else "\n")
                for line in lines[begin + 1 : end]:
                    stretch.add(line, "\n")
                stretch.suffix += suffix
                if end < count or joint.control or following is None:
                    if stretch.volatile and first_volatile is None:
                        first_volatile = len(parts)
                    parts.append(stretch)
                    new.append(stretch)
                    stretch = None
                begin, place, prefix = end, "inside", ""
            if joint.control:
                parts.append(joint.ids)
                place, prefix = "after", joint.right
        if prefix:
            new.append(_Stretch(place, prefix))
            parts.append(new[-1])
        await self._encode(new)
        ids: list[int] = []
        stable = None
        for index, part in enumerate(parts):
            if index == first_volatile:
                stable = len(ids)
            ids += part.ids if isinstance(part, _Stretch) else part
        return ids, len(ids) if stable is None else stable

    async def _encode(self, stretches: Iterable[_Stretch]) -> None:
        new: dict[Place, list[_Stretch]] = {}
        for stretch in stretches:
            if stretch.kept is not None:
                known = stretch.kept.get(_where(self._kind, stretch.place, stretch.prefix, stretch.suffix))
                if known is not None:
                    stretch.ids = memoryview(known).cast("I")
                    continue
            new.setdefault(stretch.place, []).append(stretch)
        for place, group in new.items():
            texts = [stretch.prefix + stretch.text + stretch.suffix for stretch in group]
            for stretch, ids in zip(group, await self._codec.encode_all(texts, place=place), strict=True):
                stretch.ids = ids
                if stretch.kept is not None:
                    where = _where(self._kind, place, stretch.prefix, stretch.suffix)
                    stretch.kept[where] = array("I", ids).tobytes()


def _where(kind: str, place: Place, prefix: str, suffix: str) -> str:
    """The key of `Kept`."""
    return f"{kind}\0{place}\0{prefix}\0{suffix}"


def disguised(codec: Codec, value: Any) -> Any:
    """Any JSON as a template may print it: nothing in it is a control token."""
    if isinstance(value, str):
        return codec.disguise(value)
    if isinstance(value, list):
        return [disguised(codec, item) for item in value]
    if isinstance(value, dict):
        return {codec.disguise(name): disguised(codec, item) for name, item in value.items()}
    return value


def split(text: str | None, marks: Sequence[str]) -> list[str] | None:
    """The pieces between the marks, where each stands once and in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]
