"""What of the chat model's text is the reply: neither its thinking nor the lines of the next speaker."""

from __future__ import annotations

import re

import msgspec

from yaptext.engine.base import Delta, Reasoning, Thinking

_LABELS = {"user:": 4, "assistant:": 3}
"""With the letters from which the very start of a reply is held back: it need not wait because it begins with an A."""
_SKIPPED = re.compile(r"[ \t*]")
_LONGEST = 24
"""Characters from the start of a line in which a label ends, with the marks that may stand around it."""


def reasoning_of(parser: str, thinking: Thinking) -> Reasoning | None:
    """How thinking is kept out of replies, by `REASONING_PARSER` and what the template says; None if there is none."""
    if parser == "none" or (parser == "auto" and not (thinking.on and thinking.start)):
        return None
    return Reasoning(None if parser == "auto" else parser, thinking.start, thinking.end, thinking.opened)


class Lines:
    """Ends a reply where a line begins with the label of a speaker. Its own label at the very start is left out.

    Only the beginning of a line that may become a label is held back.
    """

    def __init__(self) -> None:
        self._held = ""
        self._at_start = self._first = True
        self._after_label = False
        self.waiting = True
        """What comes next may begin, or be part of, a label."""
        self.over = False

    def take(self, text: str) -> str:
        """What of the reply is certain now."""
        if self.over:
            return ""
        if self._after_label:
            text = text.lstrip(" *")
            self._after_label = not text
        if not self._held and not self._at_start and "\n" not in text:
            return text
        told = ""
        self._held += text
        while self._held and not self.over:
            if not self._at_start:
                line, newline, rest = self._held.partition("\n")
                told += line
                self._held = newline + rest
                if not newline:
                    break
                self._at_start = True
            before = len(self._held) - len(self._held.lstrip("\r\n")) if not self._first else 0
            line = self._held[before:]
            bare = _SKIPPED.sub("", line[:_LONGEST]).lower()
            label = next((label for label in _LABELS if bare.startswith(label)), None)
            if label is not None and self._first and label == "assistant:":
                self._held = line.partition(":")[2].lstrip(" *")
                self._first = self._at_start = False
                self._after_label = not self._held
            elif label is not None:
                self.over, self._held = True, ""
            elif len(line) < _LONGEST and self._may_become_label(bare):
                break
            else:
                told += self._held[:before]
                self._held = line
                self._at_start = self._first = False
        self.waiting = bool(self._held) or self._at_start or self._after_label
        return told

    def _may_become_label(self, bare: str) -> bool:
        least = _LABELS if self._first and bare else dict.fromkeys(_LABELS, 0)
        return any(label.startswith(bare) and len(bare) >= letters for label, letters in least.items())

    def rest(self) -> str:
        """What was held back, where the text ends without a label."""
        held, self._held = self._held, ""
        return "" if self.over else held


_SENTENCE_ENDS = re.compile(r"[.!?\u2026\u061f\u06d4\u0964\u0965\u1362][\"'\u201d\u2019)\]*]*$")
_FULL_WIDTH_ENDS = re.compile(r"[\u3002\uff01\uff1f\uff0e][\"'\u201d\u2019\u300d\u300f)\]*]*$")
_ABBREVIATED = re.compile(r"(?:^|[\s(])(?:Dr|Mr|Mrs|Ms|Prof|St|vs|etc|e\.g|i\.e|z\.B|No|approx|\w)\.$", re.IGNORECASE)
_REMEMBERED = 32


class Sentences:
    """Ends a reply with its sentence, once it has so many tokens: a voice that stops in mid-sentence sounds broken."""

    def __init__(self, after_tokens: int) -> None:
        self._left = after_tokens
        self._end = ""

    def ends(self, delta: Delta) -> bool:
        """Whether the sentence before `delta` was the last. A point ends one only if white space follows."""
        if self._left <= 0 and delta.text:
            if _FULL_WIDTH_ENDS.search(self._end):
                return True
            ended = _SENTENCE_ENDS.search(self._end) and not _ABBREVIATED.search(self._end)
            if ended and delta.text[0].isspace():
                return True
        self._left -= delta.tokens - delta.reasoning
        self._end = (self._end + delta.text)[-_REMEMBERED:]
        return False


def within(lines: Lines, delta: Delta) -> Delta:
    """The delta with what of its text belongs to the reply."""
    text = lines.take(delta.text)
    if delta.finish_reason is not None:
        text += lines.rest()
    return delta if text == delta.text else msgspec.structs.replace(delta, text=text)
