"""Text that can be read aloud, made of what a model writes: without markdown, emoji, HTML, links.

It works on a stream: whatever the pieces are in which the text comes, what is sent is the same. Held back is only what
may still turn out to be such a thing.
"""

from __future__ import annotations

from typing import Any

import regex

_LONGEST = 420
"""Characters that are held back for the end of a link, a tag or a stage direction. Then they are text."""
_LINE_START = regex.compile(
    r"(?:-{3,}|\*{3,}|_{3,}|\|?[ \t]*:?-{3,}[-| \t:]*)[ \t]*\n|[ \t]*(?:#{1,6}[ \t]+|>[ \t]?|[-*+\u2022][ \t]+)"
)
_FENCE = regex.compile(r"```[^\n`]{0,40}\n")
_MARKS = regex.compile(r"\*{2,}|_{2,}|~{2,}|`+")
_STAGE = regex.compile(r"\*(?![\s*])([^*\n]{0,199}[^\s*])\*(?![*\w])")
_TAG = regex.compile(r"</?[A-Za-z][^<>\n]{0,200}>|<!--[^\n]{0,200}?-->")
_LINK = regex.compile(r"!?\[([^\[\]\n]{0,200})\]\([^()\s]{0,200}\)")
_ADDRESS = regex.compile(r"(?:https?://|www\.)[^\s<>()]{1,400}", regex.IGNORECASE)
_EMOJI = regex.compile(
    r"(?:\p{Regional_Indicator}{2}|(?![\u00A9\u00AE\u2122])\p{Extended_Pictographic}[\uFE0F\p{Emoji_Modifier}]*"
    r"(?:\u200D\p{Extended_Pictographic}[\uFE0F\p{Emoji_Modifier}]*)*|\p{Emoji_Modifier}|[\uFE0F\u20E3\u200D])+"
)
_SPACE = regex.compile(r"\s+")
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_STARTS = "`*_~<[!"
_ENDS = ".!?\u2026:;,\"')\u3002\uff01\uff1f-\u2014"


class Speakable:
    """One reply. `take` gives what is certain, `rest` what was held back at its end."""

    def __init__(self) -> None:
        self._waits = ""
        self._space = ""
        self._last = ""
        """The last character that was passed on."""
        self._line_starts = True
        self._dropped = False
        """Something was left out since the last character."""

    def take(self, text: str) -> str:
        self._waits += text
        return self._drain(final=False)

    def rest(self) -> str:
        return self._drain(final=True)

    def _drain(self, *, final: bool) -> str:
        told = ""
        while self._waits:
            step = self._step(final)
            if step is None:
                break
            used, text = step
            if used == 0:  # the inside of a link takes its place
                self._waits = text
                continue
            self._waits = self._waits[used:]
            told += self._tell(text)
        return told

    def _step(self, final: bool) -> tuple[int, str] | None:
        """How many waiting characters are used up, and their spoken text; None if more input is needed."""
        waits = self._waits
        if (spaces := _SPACE.match(waits)) is not None:
            if spaces.end() == len(waits) and not final:
                return None
            self._space = "\n" if "\n" in spaces[0] else self._space or " "
            self._line_starts |= "\n" in spaces[0]
            return spaces.end(), ""
        if self._line_starts:
            found = self._match(_LINE_START, final)
            if found is None:
                return None
            if found:
                self._dropped = True
                return found.end(), ""
        if waits[0] in _STARTS or not waits[0].isascii():
            for pattern in (_FENCE, _MARKS, _TAG, _EMOJI):
                if (found := self._match(pattern, final)) is None:
                    return None
                if found:
                    self._dropped = True
                    return found.end(), ""
            for pattern in (_STAGE, _LINK):
                if (found := self._match(pattern, final)) is None:
                    return None
                if found:
                    self._dropped = True
                    aside = pattern is _STAGE and (not self._last or self._last in _ENDS or self._space == "\n")
                    inside = "" if aside else found[1]
                    return (found.end(), "") if aside else (0, inside + waits[found.end() :])
        elif waits[0] in "hHwW" and not self._last_is_word:
            if (found := self._match(_ADDRESS, final)) is None:
                return None
            if found:
                self._dropped = True
                return found.end(), ""
        self._line_starts = False
        word = _WORD.match(waits)
        return (word.end(), word[0]) if word is not None and word.end() else (1, waits[0])

    @property
    def _last_is_word(self) -> bool:
        return not self._space and self._last.isalnum()

    def _match(self, pattern: Any, final: bool) -> Any:
        """A match at the start; False if there is none; None if that is not certain yet."""
        waits = self._waits[: _LONGEST + 1]
        found = pattern.match(waits, partial=not final)
        if found is None:
            return False
        if not final and len(waits) <= _LONGEST and (found.partial or found.end() == len(waits)):
            return None
        return False if found.partial or not found.end() else found

    def _tell(self, text: str) -> str:
        if not text:
            return ""
        space = self._space if self._last else ""
        if self._dropped and space == " " and text[0] in ".,;:!?":
            space = ""
        self._space, self._dropped, self._last = "", False, text[-1]
        return space + text
