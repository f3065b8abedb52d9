"""Prompts as token ids, built piece by piece so that what was warmed is a true prefix of what follows.

Every piece (the template's own text, the persona, each message) is encoded alone and once; a prompt is their
concatenation. What changes most stands last: persona, history, time, utterance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from yaptext.dialogue.history import Message, keep_recent
from yaptext.engine.base import Codec
from yaptext.errors import TextTooLong
from yaptext.settings import Settings

_MARKS = {"system": "MARKSYSTEM", "first": "MARKFIRST", "reply": "MARKREPLY", "second": "MARKSECOND"}
_LABELS = {"user": "\nUser: ", "assistant": "\nAssistant: ", "note": "\n"}
_KEPT_PERSONAS = 256
_OVERHEAD_TOKENS = 96
"""Room for template pieces, segment marks and the time line."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A chat template as the token ids around the contents: opening S after_system U after_user A after_reply
    U closing. Where the template takes no system message, S and the first U share one message. `newline` stands
    between two contents of one role."""

    newline: list[int]
    opening: list[int]
    after_system: list[int]
    after_user: list[int]
    after_reply: list[int]
    closing: list[int]

    def joint(self, before: str, after: str) -> list[int]:
        """What stands between the contents of two roles: system, user or assistant."""
        match before, after:
            case "system", "user":
                return self.after_system
            case "system", "assistant":
                return self.after_system + self.after_user
            case "user", "assistant":
                return self.after_user
            case "assistant", "user":
                return self.after_reply
        return self.newline


async def learn_shape(codec: Codec, tools: list[dict[str, Any]] | None = None) -> Shape | None:
    """The shape of the model's chat template, or None where it has none that fits a conversation.

    With `tools` there is no system content: the template writes its own, and `opening` holds all of it.
    """
    talk = [
        {"role": "user", "content": _MARKS["first"]},
        {"role": "assistant", "content": _MARKS["reply"]},
        {"role": "user", "content": _MARKS["second"]},
    ]
    system = {"role": "system", "content": _MARKS["system"]}
    order = [_MARKS["first"], _MARKS["reply"], _MARKS["second"]]
    newline = await codec.encode("\n")
    if tools is None:
        pieces = _split(codec.render([system, *talk]), [_MARKS["system"], *order])
        if pieces is not None:
            return Shape(newline, *[await codec.encode(piece, special=True) for piece in pieces])
    pieces = _split(codec.render(talk, tools), order)
    if pieces is None:
        return None
    opening, *rest = [await codec.encode(piece, special=True) for piece in pieces]
    return Shape(newline, opening, await codec.encode("\n\n"), *rest)


def _split(text: str | None, marks: Sequence[str]) -> list[str] | None:
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


def in_roles(shape: Shape, messages: Sequence[Message], key: str) -> tuple[list[int], str]:
    """Token ids of the messages in the template's own roles, and the role that the last one leaves open."""
    ids: list[int] = []
    role = "system"
    for message in messages:
        speaker = "system" if message.speaker == "note" else message.speaker
        ids += shape.joint(role, speaker)
        ids += message.ids[key]
        role = speaker
    return ids, role


async def fit(codec: Codec, text: str, max_tokens: int, *, keep: Literal["start", "end"], exact: bool) -> str:
    """`text` cut to `max_tokens`: by the tokenizer, or with `exact` off by 4 bytes a token."""
    if len(text.encode()) <= max_tokens:  # no token is shorter than a byte
        return text
    if exact:
        return await codec.clip(text, max_tokens, keep=keep)
    cut = text.encode()[: 4 * max_tokens] if keep == "start" else text.encode()[-4 * max_tokens :]
    return cut.decode(errors="ignore")


@dataclass(frozen=True, slots=True)
class Limits:
    """Most tokens of each part of a chat prompt."""

    persona: int
    history: int
    utterance: int
    reply: int
    exact: bool = True
    kept_personas: int = _KEPT_PERSONAS
    """Whose token ids are kept. None with `CACHE_PER_KEY`: the millisecond that this saves would tell of other keys."""

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(
            persona=settings.persona_max_tokens,
            history=settings.history_max_tokens,
            utterance=settings.user_utt_max_tokens,
            reply=settings.chat_max_out,
            exact=settings.exact_token_trim,
            kept_personas=0 if settings.cache_per_key else _KEPT_PERSONAS,
        )


class ChatPrompts:
    """Builds the chat model's prompts. `format` is segments, turns or bare; without a usable chat template
    only bare is possible, and `self.format` says what was taken."""

    def __init__(self, codec: Codec, shape: Shape | None, format: str, limits: Limits) -> None:
        self._codec, self._limits = codec, limits
        self._shape = None if format == "bare" else shape
        self.format = "bare" if self._shape is None else format
        self.stop = ("\nUser:",) if self.format == "bare" else ()
        self._personas: OrderedDict[str, list[int]] = OrderedDict()

    @classmethod
    async def open(cls, codec: Codec, format: str, limits: Limits) -> ChatPrompts:
        return cls(codec, await learn_shape(codec), format, limits)

    async def prefix(self, persona: str, messages: list[Message]) -> list[int]:
        """What every next prompt of this persona and history begins with, cut at a block of the prefix cache."""
        ids, _ = await self._standing(persona, messages)
        return ids[: len(ids) // self._codec.block_size * self._codec.block_size]

    async def turn(self, persona: str, messages: list[Message], utterance: str, now: str) -> list[int]:
        """The whole prompt of one turn. `messages` is trimmed in place to the history limit, `utterance` is
        within its limit already. Raises `TextTooLong` for a persona over its limit."""
        ids, role = await self._standing(persona, messages)
        if self._shape is None:
            return ids + await self._codec.encode(f"\n({now})\nUser: {utterance}\nAssistant:")
        if self.format == "segments":
            ids += await self._codec.encode(f"\nNow: {now}.")
            ids += self._shape.after_system
            return ids + await self._codec.encode(utterance) + self._shape.closing
        ids += self._shape.joint(role, "user")
        return ids + await self._codec.encode(f"({now}) {utterance}") + self._shape.closing

    async def _standing(self, persona: str, messages: list[Message]) -> tuple[list[int], str]:
        """The one place that lays out what stays from turn to turn."""
        ids = [] if self._shape is None else list(self._shape.opening)
        ids += await self._persona(persona)
        await self._trim(messages, len(ids))
        if self._shape is not None and self.format == "turns":
            told, role = in_roles(self._shape, messages, "chat")
            return ids + told, role
        if messages:
            ids += await self._codec.encode("\n<|history|>")
        for message in messages:
            ids += message.ids["chat"]
        return ids, "system"

    async def _persona(self, text: str) -> list[int]:
        known = self._personas.get(text)
        if known is None:
            known = await self._codec.encode(f"<|persona|>\n{text}")
            if len(known) > self._limits.persona:
                raise TextTooLong(f"persona_text is {len(known)} tokens; limit is {self._limits.persona}")
            self._personas[text] = known
            if len(self._personas) > self._limits.kept_personas:
                self._personas.popitem(last=False)
        else:
            self._personas.move_to_end(text)
        return known

    async def _trim(self, messages: list[Message], before: int) -> None:
        """Encodes what is new and drops the oldest messages over the limit."""
        limits = self._limits
        room = self._codec.max_model_len - before - limits.utterance - limits.reply - _OVERHEAD_TOKENS
        limit = max(0, min(limits.history, room))
        while new := [message for message in messages if "chat" not in message.ids]:  # more may come meanwhile
            await self._encode(new)
        sizes = [len(message.ids["chat"]) for message in messages]
        if self.format == "turns" and self._shape is not None:
            between = max(len(self._shape.after_user), len(self._shape.after_reply))
            sizes = [size + between for size in sizes]
        first = keep_recent(sizes, limit)
        if first == len(messages) and messages and sizes[-1] <= limit:
            first -= 1
        if first == len(messages) and messages and limit > 16:
            last = messages[-1]
            text = await fit(self._codec, last.text, limit - 8, keep="end", exact=limits.exact)
            cut = [Message(last.speaker, text)]
            await self._encode(cut)
            messages[:] = cut
        else:
            del messages[:first]

    async def _encode(self, messages: Sequence[Message]) -> None:
        labels = dict.fromkeys(_LABELS, "") if self.format == "turns" else _LABELS
        texts = [labels[message.speaker] + message.text.strip() for message in messages]
        for message, ids in zip(messages, await self._codec.encode_all(texts), strict=True):
            message.ids["chat"] = ids
