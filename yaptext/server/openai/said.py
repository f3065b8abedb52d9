"""What one turn says, as events of the client's dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from yaptext.server.openai.logprobs import Logprobs, logprobs_of
from yaptext.server.send_queue import SendQueue, TokenStream
from yaptext.wire.frames import Done, Error, IdentifiedCall, ServerMessage, Token, ToolCall


class Dialect(Protocol):
    """How one response is written. Each `bytes` is one event. In order: `begin`, then the events of a reply or of
    calls, then those of an end."""

    numbered: bool
    """Whether events have a hole for their number."""
    top_logprobs: int | None
    """How many of the likeliest tokens to list for each token; None for no log probabilities."""
    one_call: bool
    """Whether all calls but the first are left out (`parallel_tool_calls`)."""

    def begin(self) -> Iterable[bytes]: ...

    def text_begins(self) -> Iterable[bytes]:
        """Before the first token."""
        ...

    def token(self, token: Token) -> bytes:
        """Changes nothing: it is called again for a text that cannot be written at once."""
        ...

    def calls(self, calls: Sequence[IdentifiedCall]) -> Iterable[bytes]: ...

    def done(self, done: Done, text: str, logprobs: Logprobs | None) -> Iterable[bytes]:
        """`text` is all that was sent."""
        ...

    def failed(self, error: Error, text: str) -> Iterable[bytes]: ...

    def whole(
        self, text: str, calls: Sequence[IdentifiedCall], done: Done, logprobs: Logprobs | None
    ) -> dict[str, Any]:
        """The response as one object."""
        ...


class Text:
    """The tokens of a response, with their text."""

    def __init__(self, stream: TokenStream | None, begins: Callable[[], None]) -> None:
        self._stream, self._begins = stream, begins
        self.parts: list[str] = []
        self.sent_tokens = 0

    def push(self, text: str, tokens: int) -> None:
        if not self.parts:
            self._begins()
        self.parts.append(text)
        self.sent_tokens += tokens
        if self._stream is not None:
            self._stream.push(text, tokens)

    def retract(self) -> str:
        if self._stream is not None:
            self.parts, self.sent_tokens = [self._stream.retract()], self._stream.sent_tokens
        return "".join(self.parts)


class Said:
    """The sink of one turn: events go to `queue`, or nowhere if the response is one object. `answered` is called if it
    did not fail, before the client can know that it is over; `erred` if it did."""

    def __init__(
        self,
        dialect: Dialect,
        queue: SendQueue | None,
        erred: Callable[[Error], None],
        answered: Callable[[Said], None],
    ) -> None:
        self.dialect, self._queue, self._erred, self._answered = dialect, queue, erred, answered
        self.calls: list[IdentifiedCall] = []
        """Those that the client gets."""
        self.done: Done | None = None
        self.error: Error | None = None
        self.alternatives: Sequence[dict[str, float]] = ()
        """Those of the turn's answer, if they are wanted."""
        self._text = Text(None, lambda: None)

    @property
    def text(self) -> str:
        """All that was sent of the reply, and what waits to be."""
        return "".join(self._text.parts)

    @property
    def _logprobs(self) -> Logprobs | None:
        most = self.dialect.top_logprobs
        return None if most is None else logprobs_of(self.alternatives, most)

    def whole(self) -> dict[str, Any]:
        """The response as one object, after its `done`."""
        assert self.done is not None
        return self.dialect.whole(self.text, self.calls, self.done, self._logprobs)

    def begin(self) -> None:
        self._put(self.dialect.begin)

    def send(self, message: ServerMessage) -> None:
        if isinstance(message, ToolCall) and message.raw:
            self.calls = message.raw[:1] if self.dialect.one_call else message.raw
            self._put(lambda: self.dialect.calls(self.calls))
        elif isinstance(message, Done):
            done = self.done = message
            self._answered(self)
            self._put(lambda: self.dialect.done(done, self.text, self._logprobs))
        elif isinstance(message, Error):
            self.error = message
            self._erred(message)

    def tokens(self, turn: int) -> Text:
        stream = None if self._queue is None else self._queue.open(turn, self.dialect.token)
        self._text = Text(stream, lambda: self._put(self.dialect.text_begins))
        return self._text

    def _put(self, events: Callable[[], Iterable[bytes]]) -> None:
        if self._queue is not None:
            for event in events():
                self._queue.put_frame(event)


HOLE = b'"sequence_number":#'
"""Where the number of an event goes: text cannot hold this, since JSON escapes its quotes."""


class Numbering:
    """Numbers events in the order in which they leave, which is not the one in which they are made."""

    def __init__(self, write_now: Callable[[bytes], bool] | None) -> None:
        self._write_now, self._next = write_now, 0

    def of(self, event: bytes) -> bytes:
        """The event with the next number, if it has a hole."""
        numbered = self._numbered(event)
        self._next += numbered != event
        return numbered

    def write_now(self, event: bytes) -> bool:
        if self._write_now is None or not self._write_now(numbered := self._numbered(event)):
            return False
        self._next += numbered != event
        return True

    def _numbered(self, event: bytes) -> bytes:
        return event.replace(HOLE, b'"sequence_number":%d' % self._next, 1)
