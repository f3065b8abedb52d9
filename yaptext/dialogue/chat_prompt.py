"""The chat model's prompts as token ids. What changes most stands last: persona, history, time, utterance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import structlog
from cachetools import LRUCache, cachedmethod

from yaptext.dialogue.layout import Layout
from yaptext.dialogue.talk import Line, Role, Rounds, Said, Talk
from yaptext.dialogue.transcript import Message, in_lines, keep_recent
from yaptext.engine.base import Codec
from yaptext.errors import TextTooLong
from yaptext.settings import Settings

Format = Literal["segments", "turns", "bare"]
_log = structlog.get_logger(__name__)
_LABELS = {"user": "User: ", "assistant": "Assistant: ", "note": "", "tool": "Tool: "}
_SPEAK_FIRST = "(The user has not said anything yet. Begin the conversation.)"
_GO_ON = "(The user is silent. Go on.)"
"""Stand where an utterance does, if there is none."""
_HISTORY = Line("<|history|>")
_KEPT_PERSONAS = 256
_OVERHEAD_TOKENS = 96
"""Room for template pieces, segment marks and the time line."""
_SAMPLES = (
    (
        "Really?! No...",
        'He said: "7 x 8 = 56" \u2013 twice.\n\n  - and then\n\tleft',
        "ok \U0001f642",
        "\u597d\u7684\u3002",
    ),
    ("a/b c's 1,234.50 \u00a31", "na\u00efve  caf\u00e9;\nit's (fine) {}", "What's <b>that</b>?", "/help & more!"),
)
"""User and assistant in turn. They end and begin as texts do: letters, digits, marks, quotes, in several scripts."""


async def fit(codec: Codec, text: str, max_tokens: int, *, keep: Literal["start", "end"], exact: bool) -> str:
    """`text` cut to `max_tokens`: by the tokenizer, or with `exact` off by 4 bytes a token."""
    if codec.bounded_by_bytes and len(text.encode()) <= max_tokens:
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
    thinking: int = 0
    """Added to `reply` for a model that thinks before it speaks."""
    kept_personas: int = _KEPT_PERSONAS
    """Whose token ids are kept. None with `CACHE_PER_KEY`: the millisecond that this saves would reveal other keys."""

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(
            persona=settings.persona_max_tokens,
            history=settings.history_max_tokens,
            utterance=settings.user_utt_max_tokens,
            reply=settings.chat_max_out,
            exact=settings.exact_token_trim,
            thinking=settings.chat_thinking_max_out,
            kept_personas=0 if settings.cache_per_key else _KEPT_PERSONAS,
        )


@dataclass(frozen=True, slots=True)
class Around:
    """What stands beside the utterance of one turn alone: `note` just before it; after it what its tools returned, as
    `results` in words, or as `rounds` for a template that has a form for them."""

    note: str = ""
    results: Sequence[str] = ()
    rounds: Rounds = ()

    def lines(self, said: str) -> list[Line]:
        texts = (in_lines(self.note.strip()), said, *map(in_lines, self.results))
        return [Line(text, volatile=True) for text in texts if text]


class ChatPrompts:
    """Builds the chat model's prompts. `format` is what was taken: the one that was asked for, else the next that the
    template allows, and `lacking` says why. `plain` prompts hold nothing of ours: no mark, no time."""

    def __init__(
        self,
        codec: Codec,
        format: Format,
        limits: Limits,
        layout: Layout,
        lacking: str | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self.plain = plain
        self._codec, self._limits = codec, limits
        self.format, self.layout, self.lacking = format, layout, lacking
        self._personas: LRUCache[str, Line] = LRUCache(limits.kept_personas)

    @classmethod
    async def open(
        cls, codec: Codec, format: Format, limits: Limits, *, thinking: bool = False, plain: bool = False
    ) -> ChatPrompts:
        """`thinking` is what the template's switch for that is set to."""
        formats: dict[Format, list[Format]] = {"segments": ["segments"], "turns": ["turns", "segments"], "bare": []}
        for taken in formats[format]:
            layout = await Layout.learn(codec, "chat", _samples(taken), thinking=thinking)
            if layout is not None:
                lacking = None if taken == format else f"the chat template refuses CHAT_PROMPT_FORMAT={format}"
                return cls(codec, taken, limits, layout, lacking, plain=plain)
        lacking = None
        if format != "bare":
            refused = "the chat template refuses a conversation"
            lacking = refused if codec.has_template else "the model has no chat template"
        return cls(codec, "bare", limits, await Layout.plain(codec, "chat"), lacking, plain=plain)

    @property
    def labelled(self) -> bool:
        """Whether the history is in the prompt as lines with labels, which the model may continue."""
        return self.format != "turns"

    async def prefix(self, persona: str, messages: list[Message]) -> list[int]:
        """What every next prompt of this persona and history begins with, cut at a block of the prefix cache."""
        await self._stand(persona, messages)
        if self.format == "turns" and messages and messages[-1].speaker == "user":
            del messages[-1]  # what follows may come to stand in one message with it
        ids = await self.layout.prefix(_ways(self.format, self._persona(persona), messages))
        return ids[: len(ids) // self._codec.block_size * self._codec.block_size]

    async def turn(
        self,
        persona: str,
        messages: list[Message],
        utterance: str | None,
        now: str | None,
        around: Around | None = None,
    ) -> list[int]:
        """The whole prompt of one turn; `now` is the time as the model reads it. `messages` is trimmed in place to the
        history limit, `utterance` is within its own. Raises `TextTooLong` for a persona over its limit."""
        await self._stand(persona, messages)
        rounds: Rounds = ()
        if around is not None and around.rounds and self.layout.calls:
            rounds, around = around.rounds, replace(around, results=())
        return await self.layout.ids(self.talk(persona, messages, utterance, now, around), rounds)

    def talk(
        self,
        persona: str,
        messages: Sequence[Message],
        utterance: str | None,
        now: str | None,
        around: Around | None = None,
    ) -> Talk:
        """The conversation that the prompt of a turn renders."""
        if utterance is None:
            utterance = _GO_ON if messages else _SPEAK_FIRST
        return _talk(self.format, self._persona(persona), messages, utterance, now, around or Around())

    def sent(self, utterance: str, now: str | None) -> str | None:
        """How a turn's prompt has the utterance, if later ones have to repeat that to find it in the cache."""
        return f"({now}) {utterance.strip()}" if self.format == "turns" and now is not None else None

    async def check_persona(self, text: str) -> None:
        """Raises `TextTooLong` for a persona over its limit."""
        await self._persona_size(text, alone=self.format == "turns", where=" - at $.persona_text")

    async def _persona_size(self, text: str, *, alone: bool, where: str = "") -> int:
        (size,) = await self.layout.measure([("system", self._persona(text))], alone=alone)
        if size > (limit := self._limits.persona):
            raise TextTooLong(f"persona_text is {size} tokens; limit is {limit} (PERSONA_MAX_TOKENS){where}")
        return size

    @cachedmethod(lambda self: self._personas)
    def _persona(self, text: str) -> Line:
        mark = "" if self.plain else "<|persona|>\n"
        return Line(f"{mark}{in_lines(text, labels=False)}".strip(), {})

    async def _stand(self, persona: str, messages: list[Message]) -> None:
        """Checks the persona, and drops the oldest messages over the limit."""
        if self.layout.day != self._codec.day:
            await self._learn_again()
        limits = self._limits
        alone = self.format == "turns" and not any(message.speaker == "note" for message in messages)
        size = await self._persona_size(persona, alone=alone)
        limit = max(0, min(limits.history, self.room - size))
        while True:
            before = list(messages)  # more may come meanwhile
            sizes = await self._sizes(before)
            if len(before) == len(messages):
                break
        first = keep_recent(sizes, limit)
        if first == len(messages) and messages and sizes[-1] <= limit:
            first -= 1
        if first == len(messages) and messages and limit > 16:
            last = messages[-1]
            text = await fit(self._codec, last.text, limit - 8, keep="end", exact=limits.exact)
            messages[:] = [Message(last.speaker, text)]
        else:
            del messages[:first]

    @property
    def room(self) -> int:
        """Tokens of the model's context that utterance and reply leave to persona and history."""
        limits = self._limits
        reply = limits.reply + (limits.thinking if self.layout.thinking.on else 0)
        return self._codec.max_model_len - self.layout.opening - limits.utterance - reply - _OVERHEAD_TOKENS

    async def _sizes(self, messages: Sequence[Message]) -> list[int]:
        in_roles = self.format == "turns"
        lines = [(_role(message) if in_roles else None, _line(self.format, message)) for message in messages]
        between = self.layout.overhead if in_roles else 0
        return [size + between for size in await self.layout.measure(lines)]

    async def _learn_again(self) -> None:
        """The template says another date now."""
        thinking = self.layout.asks_to_think
        layout = await Layout.learn(self._codec, "chat", _samples(self.format), thinking=thinking)
        if layout is not None:
            self.layout = layout


def _role(message: Message) -> Role | None:
    """In a prompt of roles. What a tool returned belongs to what the user asked for."""
    return None if message.speaker == "note" else "user" if message.speaker == "tool" else message.speaker


def _line(format: Format, message: Message) -> Line:
    line: Line | None = getattr(message.lines, format)
    if line is None:
        text = message.text.strip()
        text = (message.sent or text).strip() if format == "turns" else _LABELS[message.speaker] + in_lines(text)
        line = Line(text, {})
        setattr(message.lines, format, line)
    return line


def _talk(
    format: Format,
    persona: Line,
    messages: Sequence[Message],
    utterance: str,
    now: str | None,
    around: Around = Around(),
) -> Talk:
    """The one place that lays out a chat prompt."""
    utterance = utterance.strip()
    if format == "turns":
        system = [persona, *(_line(format, message) for message in messages if message.speaker == "note")]
        said = [
            *([Said("system", system)] if any(line.text for line in system) else []),
            *(Said(role, [_line(format, message)]) for message in messages if (role := _role(message)) is not None),
        ]
        last = around.lines(utterance if now is None else f"({now}) {utterance}".strip()) or [Line("", volatile=True)]
        return [*said, Said("user", last)]
    lines = [persona]
    if messages:
        lines.append(_HISTORY)
    lines += [_line(format, message) for message in messages]
    if format == "bare":
        last = around.lines(f"User: {in_lines(utterance)}".strip())
        time = [] if now is None else [Line(f"({now})", volatile=True)]
        return [Said("user", [*lines, *time, *last, Line("Assistant:", volatile=True)])]
    if now is not None:
        lines.append(Line(f"Now: {now}.", volatile=True))
    return [Said("system", lines), Said("user", around.lines(utterance) or [Line("", volatile=True)])]


def _ways(format: Format, persona: Line, messages: Sequence[Message]) -> list[Talk]:
    """A conversation, and possible continuations."""
    return [
        _talk(format, persona, [*messages, *more], utterance, now)
        for more, utterance, now in (
            ([], "One", "Sunday, 21:46"),
            ([Message("user", "Alpha"), Message("assistant", "Beta")], "two", "Monday, 7:05"),
            ([Message("user", '"7"'), Message("assistant", "\u4f60")], "3", "?"),
        )
    ]


def _samples(format: Format) -> list[Talk]:
    """Conversations as they come: with nothing said before, with exchanges, with an assistant that spoke first."""
    persona = Line('<|persona|>\nYou are Yap. Say "hi!"\n\n1) Be kind.')
    talks = [
        [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)] for texts in _SAMPLES
    ]
    first = [Message("note", "Earlier on."), Message("assistant", "Hello?"), Message("user", "cut off"), talks[1][0]]
    before: tuple[list[Message], ...] = ([], first, talks[1])
    samples = [_talk(format, persona, messages, "What time is it?", "Sunday, 21:46") for messages in before]
    return samples + _ways(format, persona, talks[0])[:2]
