"""Transcripts: what was said in a session, as far as a prompt keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from sys import getsizeof

import msgspec

from yaptext.dialogue.heard import Spoken, heard_part
from yaptext.dialogue.talk import Line
from yaptext.store.base import Speaker
from yaptext.wire.frames import HistoryItem

_LABEL = re.compile(
    r"\s*(?P<stamp>\[[^\]\n]{1,32}\]\s*|\d{1,2}:\d{2}(?::\d{2})?\s+)?(?P<mark>\*\*|__)?"
    r"(?P<name>user|human|you|me|assistant|ai|bot)(?:\*\*|__)?\s?[:\uff1a](?:\*\*|__)?[^\S\n]*",
    re.IGNORECASE | re.ASCII,
)
_SPEAKERS: dict[str, Speaker] = {
    **dict.fromkeys(("user", "human", "you", "me"), "user"),
    **dict.fromkeys(("assistant", "ai", "bot"), "assistant"),
}
_MARK = re.compile(r"<\|(persona|history)\|>", re.IGNORECASE)
_LABEL_OR_MARK = re.compile(
    r"(user|assistant|message|calls|now)\W{0,3}?\s?[:\uff1a]|<\|(persona|history)\|>", re.IGNORECASE
)
_DECORATION = " \t*_>#-"


def in_lines(text: str, *, labels: bool = True) -> str:
    """`text` for a prompt of labelled lines: if one of its own lines begins like a label or a segment's mark, it is
    joined to the line before. Personas may hold a dialogue as an example: with `labels` off only marks count."""
    first, *rest = text.splitlines(keepends=True) or [""]
    if not rest:
        return text
    forged = _LABEL_OR_MARK if labels else _MARK
    joined = [first]
    for line in rest:
        bare = line.lstrip(_DECORATION)
        if not forged.match(bare):
            joined.append(line)
            continue
        while joined and not joined[-1].strip():
            joined.pop()
        if joined:
            joined[-1] = joined[-1].rstrip() + " "
        joined.append(bare)
    return "".join(joined)


class Lines(msgspec.Struct, eq=False, gc=False):
    """How a message stands in each kind of prompt, with its token ids: made once in its life, not once a turn."""

    segments: Line | None = None
    turns: Line | None = None
    bare: Line | None = None
    tool: Line | None = None
    instruction: Line | None = None
    """In a tool prompt whose template knows no tools."""


class Message(msgspec.Struct, eq=False, gc=False):
    """One thing said. `note` is transcript text without a speaker, `tool` is a call with what it returned. `sent` is
    how the prompt of its own turn had an utterance, `spoken` how a reply was sent, if that differs from `text`."""

    speaker: Speaker
    text: str
    sent: str | None = None
    spoken: Spoken | None = None
    lines: Lines = msgspec.field(default_factory=Lines)


def parse(text: str) -> list[Message]:
    """Messages of a written transcript. A line that opens with a label begins one, other lines continue it.

    Labels are User, Human, You, Me, and Assistant, AI, Bot, in any case, with a colon (or a full-width one), in bold or
    not, after a time or not: `**User:** hi`, `[12:01] User: hi`. All labels of a transcript look like its first one, so
    that `user: str` inside a message is no label where they are `User:`. Text before the first label has no speaker:
    each of its lines is a note. Empty messages are dropped.
    """
    found: list[tuple[Speaker, list[str]]] = []
    known: dict[str, tuple[Speaker, tuple[bool, bool, bool]]] = {}  # a transcript has few labels, many times
    form: tuple[bool, bool, bool] | None = None
    for line in text.lstrip("\ufeff").strip().splitlines():
        if (label := _LABEL.match(line)) is not None:
            written = label[0]
            if written not in known:
                known[written] = _SPEAKERS[label["name"].lower()], _form(label)
            speaker, looks = known[written]
            form = form or looks
            if looks == form:
                found.append((speaker, [line[len(written) :]]))
                continue
        if form is None:
            found.append(("note", [line]))
        else:
            found[-1][1].append(line)
    messages = ((speaker, "\n".join(lines).strip()) for speaker, lines in found)
    return [Message(speaker, text) for speaker, text in messages if text]


def _form(label: re.Match[str]) -> tuple[bool, bool, bool]:
    """How a label is written: with a time, in bold, in small letters."""
    return bool(label["stamp"]), bool(label["mark"]), label["name"].islower()


def of_items(items: Iterable[HistoryItem]) -> list[Message]:
    """Messages of a history that comes as a list. A speaker with a name appears under it."""
    found = []
    for item in items:
        text = item.content.strip()
        if text:
            speaker: Speaker = "note" if item.role == "system" else item.role
            found.append(Message(speaker, f"{item.name.strip()}: {text}" if item.name and item.name.strip() else text))
    return found


def recent(text: str, max_bytes: int) -> str:
    """The end of a long transcript, from the start of a line on, by its bytes in UTF-8: a rare character may be as many
    tokens. Like `keep_recent` it cuts in steps, so that a growing transcript keeps its beginning from turn to turn."""
    encoded = text.encode(errors="replace")
    cut = _in_steps(len(encoded) - max_bytes, max_bytes)
    if not cut:
        return text
    left = encoded[cut:].decode(errors="ignore")
    _, _, whole_lines = left.partition("\n")
    return whole_lines if whole_lines.strip() else left


def keep_recent(sizes: Sequence[int], limit: int) -> int:
    """Index of the first message to keep so that the kept `sizes` (tokens) sum to at most `limit`.

    What is dropped is rounded up to quarters of the limit, so that a growing transcript moves its cut, and
    loses its cached prefix, once in a quarter's worth of talk instead of every turn. The cut depends on the
    transcript alone: a client that sends all of it each turn gets the same one.
    """
    target = _in_steps(sum(sizes) - limit, limit)
    for index, size in enumerate(sizes):
        if target <= 0:
            return index
        target -= size
    return len(sizes)


def _in_steps(excess: int, limit: int) -> int:
    """What is over the limit, rounded up to quarters of it."""
    step = max(1, limit // 4)
    return max(0, -(-excess // step) * step)


_MESSAGE_BYTES, _TEXT_COPIES = 600, 6
"""What a message weighs beside its text, and its text: twice as a string, and at worst a token of 4 bytes a byte."""
REMEMBERED_CHARS = 65_536
"""A client's transcript that is longer is encoded again each turn rather than kept with its token ids."""


class Transcript:
    """The messages of one session, oldest first."""

    __slots__ = ("_sent", "messages")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._sent: list[Message] = []

    def copy(self) -> Transcript:
        """Another with the same messages, and so with their token ids."""
        copied = Transcript()
        copied.messages, copied._sent = list(self.messages), self._sent
        return copied

    def replace(self, new: list[Message], warmed: Sequence[Message] = (), *, remember: bool = True) -> None:
        """Takes a client's own transcript. Messages that stood in the last one keep their token ids, also
        those that a prompt had no room for; the first one takes them from `warmed`."""
        for index, (old, message) in enumerate(zip(self._sent or warmed, new, strict=False)):
            if old.speaker != message.speaker or old.text != message.text:
                break
            new[index] = old
        self._sent = new if remember else []
        self.messages = list(new)

    @property
    def bytes(self) -> int:
        """What it takes in memory, roughly, and no less."""
        texts = [message.text for message in self.messages]
        texts += [message.text for message in self._sent]  # often the same ones
        return _MESSAGE_BYTES * len(texts) + _TEXT_COPIES * sum(map(getsizeof, texts))

    def bound(self, max_chars: int) -> None:
        """Drops the oldest messages over the limit, but not the last one: turns that were cut before their prompt was
        made trim nothing."""
        sizes = [len(message.text) for message in self.messages]
        if sum(sizes) > max_chars:
            del self.messages[: min(keep_recent(sizes, max_chars), len(sizes) - 1)]

    def add_turn(
        self,
        utterance: str | None,
        reply: str,
        *,
        sent: str | None = None,
        results: Sequence[str] = (),
        spoken: Spoken | None = None,
    ) -> None:
        """`sent` is the utterance as it stood in the prompt, `spoken` the reply as the client got it, if they differ;
        `results` are what tools returned in between."""
        if utterance is not None:
            self.messages.append(Message("user", utterance, sent=sent))
        self.messages += [Message("tool", result) for result in results]
        if reply.strip():
            self.messages.append(Message("assistant", reply, spoken=spoken))

    def cut_reply(self, chars: int | None, text: str | None, mark: str = "") -> None:
        """Cuts the last reply to what the user heard of it, and has `mark` say so. A reply of which nothing was heard
        goes."""
        if not self.messages or self.messages[-1].speaker != "assistant":
            return
        last = self.messages[-1]
        if last.spoken is not None:
            chars, text = last.spoken.own(last.text, len(heard_part(last.spoken.text, chars, text))), None
        heard = heard_part(last.text, chars, text)
        if heard != last.text:
            self.messages[-1:] = [Message("assistant", kept)] if (kept := cut_short(heard, mark)) else []


def cut_short(heard: str, mark: str) -> str:
    """A reply of which only this was heard, as the next prompts show it."""
    heard = heard.rstrip()
    return f"{heard} {mark}" if heard and mark else heard
