"""How much of a reply the user heard: by characters, or by the words that a TTS spoke."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex

_BEFORE = 64
"""Characters in which a grapheme that a cut falls into has begun."""
_TIMES = 4
"""Of a reply's length: what is spoken of it is never longer, with all white space and marks that a TTS adds."""


@dataclass(frozen=True, slots=True)
class Heard:
    """How much of a reply the user heard, as the client says it; nothing of both is all of it."""

    chars: int | None = None
    text: str | None = None

    @classmethod
    def of(cls, message: Any) -> Heard | None:
        """Of a frame that has `heard_chars` or `heard_text`."""
        said = cls(message.heard_chars, message.heard_text)
        return None if said == cls() else said


@dataclass(frozen=True, slots=True)
class Spoken:
    """How a reply was sent, if that differs from the model's own words. `marks` are lengths of both, step by step."""

    text: str
    marks: Sequence[tuple[int, int]]

    def own(self, words: str, length: int) -> int:
        """How much of `words`, the model's own, is in so much of the text. From the last step before it on, letter by
        letter, as a step may hold something back."""
        if length >= len(self.text):
            return len(words)
        place = bisect_right(self.marks, (length, len(words)))
        text, own = self.marks[place - 1] if place else (0, 0)
        return own + _aligned(words[own:], self.text[text:length])


def heard_part(reply: str, chars: int | None, text: str | None) -> str:
    """The beginning of `reply` that was heard. `chars` counts Unicode code points; `text` is aligned with the reply,
    whatever its case and white space, and wins. Never ends inside a grapheme. All of it if neither is given."""
    if text is not None:
        return _whole(reply, _aligned(reply, text))
    return reply if chars is None else _whole(reply, chars)


def _aligned(reply: str, text: str) -> int:
    """Where in `reply` the spoken `text` ends. Marks that only one of them has are passed over: a TTS says no asterisk
    and no smiley. From the first letter or digit that differs on nothing was heard."""
    said = [(folded, end) for end, char in enumerate(reply, 1) for folded in char.casefold() if not folded.isspace()]
    text = text[: _TIMES * len(reply) + _BEFORE]
    spoken = [char for char in text.casefold() if not char.isspace()]
    here = there = last = 0
    while here < len(said) and there < len(spoken):
        char, end = said[here]
        if char == spoken[there]:
            last, here, there = end, here + 1, there + 1
        elif not char.isalnum():
            here += 1
        elif not spoken[there].isalnum():
            there += 1
        else:
            break
    return last


def _whole(text: str, cut: int) -> str:
    """`text` up to the last end of a grapheme that is not after `cut`."""
    if cut >= len(text):
        return text
    begin = max(0, cut - _BEFORE)
    ends = [begin + found.end() for found in regex.finditer(r"\X", text[begin : cut + _BEFORE])]
    return text[: max((end for end in ends if end <= cut), default=0 if begin == 0 else cut)]
