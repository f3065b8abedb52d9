"""Transcripts: what was said in a session, and how much of it a prompt keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Speaker = Literal["user", "assistant", "note"]

_LABEL = re.compile(r"^\s*(user|human|assistant|ai|bot)\s*:[^\S\n]*", re.IGNORECASE | re.ASCII)
_SPEAKERS: dict[str, Speaker] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
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
        if forged.match(bare):
            joined[-1] = joined[-1].rstrip() + " "
        joined.append(bare if forged.match(bare) else line)
    return "".join(joined)


@dataclass(slots=True, eq=False)
class Message:
    """One thing said. `note` is transcript text without a speaker; only the first message can be one."""

    speaker: Speaker
    text: str
    ids: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    """Its token ids by prompt and place (`layout.Kept`)."""


def parse(text: str) -> list[Message]:
    """Messages of a written transcript: a line that opens with `User:` or `Assistant:` (or human, ai, bot)
    begins one, other lines continue it. Empty messages are dropped."""
    found: list[tuple[Speaker, list[str]]] = []
    for line in text.strip().splitlines():
        label = _LABEL.match(line)
        if label:
            found.append((_SPEAKERS[label[1].lower()], [line[label.end() :]]))
        elif found:
            found[-1][1].append(line)
        else:
            found.append(("note", [line]))
    messages = (Message(speaker, "\n".join(lines).strip()) for speaker, lines in found)
    return [message for message in messages if message.text]


def recent(text: str, max_chars: int) -> str:
    """The end of a long transcript, from the start of a line on. Like `keep_recent` it cuts in steps, so that a
    growing transcript keeps its beginning from turn to turn."""
    cut = _in_steps(len(text) - max_chars, max_chars)
    if not cut:
        return text
    line = text.find("\n", cut)
    return text[line + 1 :] if line >= 0 else text[cut:]


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


_REMEMBERED_CHARS = 65_536
"""A client's transcript that is longer is encoded anew each turn rather than kept with its token ids."""


class Transcript:
    """The messages of one session, oldest first."""

    __slots__ = ("_sent", "messages")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._sent: list[Message] = []

    def replace(self, text: str, warmed: Sequence[Message] = ()) -> None:
        """Takes a client's own transcript. Messages that stood in the last one keep their token ids, also
        those that a prompt had no room for; the first one takes them from `warmed`."""
        new = parse(text)
        for index, (old, message) in enumerate(zip(self._sent or warmed, new, strict=False)):
            if old.speaker != message.speaker or old.text != message.text:
                break
            new[index] = old
        self._sent = new if len(text) <= _REMEMBERED_CHARS else []
        self.messages = list(new)

    def add_turn(self, utterance: str, reply: str) -> None:
        self.messages.append(Message("user", utterance))
        if reply.strip():  # kept as it was sent, since `heard_chars` counts in it
            self.messages.append(Message("assistant", reply))

    def cut_reply(self, heard_chars: int) -> None:
        """Cuts the last reply to what the user heard of it. A reply of which nothing was heard goes."""
        if not self.messages or self.messages[-1].speaker != "assistant":
            return
        last = self.messages[-1]
        if heard_chars >= len(last.text):
            return
        heard = last.text[:heard_chars].rstrip()
        self.messages[-1:] = [Message("assistant", heard)] if heard else []
