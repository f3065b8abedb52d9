"""A reply on its way to the client: held until the decision is out, then put into words for a TTS."""

from __future__ import annotations

import time
from typing import Protocol

from yaptext.dialogue.heard import Heard, Spoken, heard_part
from yaptext.dialogue.speakable import Speakable
from yaptext.dialogue.transcript import cut_short
from yaptext.engine.base import Delta
from yaptext.wire.frames import ServerMessage


class TokenSink(Protocol):
    """Where one turn's tokens go. Pushing never waits; what the socket has not taken can be taken back."""

    sent_tokens: int
    """Model tokens whose text was handed to the socket."""

    def push(self, text: str, tokens: int) -> None: ...

    def retract(self) -> str:
        """Drops what still waits; returns all text that was handed to the socket."""
        ...


class Sink(Protocol):
    """Where a turn's frames go. Neither method waits."""

    def send(self, message: ServerMessage) -> None: ...

    def tokens(self, turn: int) -> TokenSink: ...


class Reply:
    """What one turn says. Nothing leaves after `close`."""

    __slots__ = ("_held", "_marks", "_own", "_own_chars", "_sent_chars", "_sink", "_speakable", "_text", "_unsent",
                 "closed", "first_at")  # fmt: skip

    def __init__(self, sink: TokenSink, *, speakable: bool) -> None:
        self._sink = sink
        self._speakable = Speakable() if speakable else None
        self._text: list[str] = []
        self._own: list[str] = []
        """The model's own words, if they are sent otherwise."""
        self._marks: list[tuple[int, int]] = []
        self._sent_chars = self._own_chars = self._unsent = 0
        self._held: list[Delta] | None = None
        self.closed = False
        self.first_at: float | None = None
        """When its first text left (`time.perf_counter`)."""

    def hold(self) -> None:
        """From here on deltas wait for `release`."""
        self._held = []

    def release(self) -> None:
        """Sends what waits, and what comes from here on."""
        held, self._held = self._held, None
        for delta in held or ():
            self.take(delta)

    def close(self) -> None:
        self.closed = True

    def take(self, delta: Delta) -> None:
        """Sends what the chat engine said, or keeps it while the decision is awaited."""
        if self._held is not None:
            self._held.append(delta)
            return
        if self.closed:
            return
        text = delta.text
        if text and self._speakable is not None:
            text = self._in_speech(self._speakable, text)
        self._push(text, delta.tokens - delta.reasoning)

    def _push(self, text: str, tokens: int) -> None:
        """Tokens without a text of their own, as of half a character, count with the next that has one."""
        self._unsent += tokens
        if not text:
            return
        self._sink.push(text, self._unsent)
        self._unsent = 0
        self._text.append(text)
        if self.first_at is None:
            self.first_at = time.perf_counter()

    def _in_speech(self, speakable: Speakable, text: str) -> str:
        """What is sent of the model's own `text`, and what was held back before it."""
        self._own.append(text)
        self._own_chars += len(text)
        text = speakable.take(text)
        self._sent_chars += len(text)
        self._marks.append((self._sent_chars, self._own_chars))
        return text

    @property
    def text(self) -> str:
        """All that was passed on so far."""
        return "".join(self._text)

    def whole(self) -> tuple[str, str, Spoken | None]:
        """Sends the rest of a reply that came to its end. Returns the text as it was sent, the model's own words, and
        how they belong together, if they differ."""
        if self._speakable is None:
            return self.text, self.text, None
        self._push(self._speakable.rest(), 0)
        text, own = self.text, "".join(self._own)
        return text, own, None if own == text else Spoken(text, self._marks)

    def retract(self) -> str:
        """Takes back what the socket has not taken; returns the rest."""
        return self._sink.retract()

    def heard(self, sent: str, heard: Heard, mark: str) -> tuple[str, Spoken | None]:
        """The model's own words of what was heard of what was sent, with the mark of an interruption, and how they were
        sent, if that differs."""
        reply = heard_part(sent, heard.chars, heard.text)
        if self._speakable is None:
            return cut_short(reply, mark), None
        own = "".join(self._own)
        own = own[: Spoken(sent, self._marks).own(own, len(reply))]
        return cut_short(own, mark), Spoken(reply, self._marks)
