"""One turn of a conversation, as its events: from the ack to the last `done`, over the calls of tools in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Protocol

from yaptext.client.errors import YapTextError
from yaptext.client.events import Event
from yaptext.client.tools import Callables, results_of
from yaptext.wire.frames import Ack, Done, IdentifiedCall, Timings, Token, ToolCall, ToolResultItem, Usage


class Line(Protocol):
    """What a turn needs of its conversation."""

    async def begin(self, turn: Turn, frame: str) -> bool:
        """Sends the frame that begins a turn of the service, and returns at its ack. False, and nothing is sent, if
        `turn` is stopped."""
        ...

    async def cancel(self, turn: Turn, *, heard_text: str | None, heard_chars: int | None) -> None:
        """Returns when the turn is over. Does nothing if another turn has begun since."""
        ...

    def answer(self, turn: Turn, results: list[ToolResultItem]) -> str:
        """The frame that brings the results of a turn's calls."""
        ...


class Turn:
    """`async with` sends the utterance, `async for` gives its events. Leaving the block early cancels the turn.

    The properties are those of what has arrived, which may be more than what was iterated. A new turn of the
    conversation ends this one with its `done`; its iteration then ends, and `cancelled` is true. Iterating raises a
    `YapTextError` if the turn failed: `ServiceError` with its code, or `ConnectionLost`."""

    def __init__(self, line: Line, frame: str, callables: Callables) -> None:
        self._line, self._frame, self._callables = line, frame, callables
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._stopped = asyncio.Event()
        self._begun = self._never = False
        self._error: YapTextError | None = None
        self._text: list[str] = []
        self.ack: Ack | None = None
        """Of the turn that runs; of the last one after the end. With results of tools there are several."""
        self.decisions: list[ToolCall] = []
        self.dones: list[Done] = []

    # --- what came

    @property
    def number(self) -> int:
        """0 before the ack."""
        return self.ack.turn if self.ack else 0

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def decision(self) -> ToolCall | None:
        """The decision on the utterance; None if no tool model is deployed. `decisions` has those after results,
        too."""
        return self.decisions[0] if self.decisions else None

    @property
    def calls(self) -> list[IdentifiedCall]:
        """The calls that wait for their results after the end of this turn."""
        return self.decisions[-1].raw if self.decisions and self.finish_reason == "tool_calls" else []

    @property
    def usage(self) -> Usage | None:
        """The sum of all that ran for this turn; None before the end."""
        used = [done.usage for done in self.dones if isinstance(done.usage, Usage)]
        names = Usage.__struct_fields__
        return Usage(*(sum(getattr(usage, name) for usage in used) for name in names)) if used else None

    @property
    def timings(self) -> Timings | None:
        """Of the last `done`: after results of tools they begin with the results."""
        return self.dones[-1].timings if self.dones and isinstance(self.dones[-1].timings, Timings) else None

    @property
    def finish_reason(self) -> str | None:
        reason = self.dones[-1].finish_reason if self.dones else None
        return reason if isinstance(reason, str) else None

    @property
    def cancelled(self) -> bool:
        """Whether it ended before its answer did."""
        done = self.dones[-1] if self.dones else None
        return self._never or (done is not None and (done.cancelled is True or (self.stopped and self._answers_itself)))

    @property
    def over(self) -> bool:
        """True if the service has nothing to do for it."""
        return self._never or self._error is not None or (bool(self.dones) and self.dones[-1].turn == self.number)

    @property
    def stopped(self) -> bool:
        """True if it is to end before its answer does."""
        return self._stopped.is_set()

    @property
    def _answers_itself(self) -> bool:
        return any(call.name in self._callables for call in self.calls)

    # --- what to do

    async def __aenter__(self) -> Turn:
        return self if self._begun else await self.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if not self.over:
            with suppress(YapTextError):  # it goes with its connection
                await self._line.cancel(self, heard_text=None, heard_chars=None)

    async def begin(self) -> Turn:
        """As entering the block does, if leaving one is not to cancel the turn. Raises why it was refused."""
        self._begun = True
        try:
            self._never = not await self._line.begin(self, self._frame)
        except YapTextError as error:
            self._error = error
            raise
        return self

    def __aiter__(self) -> Turn:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self.over and not await self._answer_calls():
                raise StopAsyncIteration
            if not self._events and not self.over:
                self._news.clear()
                await self._news.wait()
        return self._events.popleft()

    @property
    async def text_stream(self) -> AsyncIterator[str]:
        """The pieces of the reply."""
        async for event in self:
            if isinstance(event, Token):
                yield event.text

    async def result(self) -> Turn:
        """Reads to the end."""
        async for _ in self:
            pass
        return self

    async def cancel(self, *, heard_text: str | None = None, heard_chars: int | None = None) -> None:
        """Ends the turn; returns when it has ended. The session keeps what the user heard of the reply: the words, or a
        number of Unicode code points; without either, all that was sent. After the end this says that playback was
        cut short. It does nothing if another turn has begun since: give `heard_text` to that one."""
        self.stop()
        if self._begun:
            await self._line.cancel(self, heard_text=heard_text, heard_chars=heard_chars)

    # --- what the conversation does with it

    def take(self, event: Event) -> None:
        match event:
            case Ack():
                self.ack = event
            case ToolCall():
                self.decisions.append(event)
            case Token():
                self._text.append(event.text)
            case Done():
                self.dones.append(event)
        self._events.append(event)
        self._news.set()

    def fail(self, error: YapTextError) -> None:
        if not self.over:
            self._error = error
            self._news.set()

    def stop(self) -> None:
        """No call of it is answered any more."""
        self._stopped.set()

    # --- tools

    async def _answer_calls(self) -> bool:
        """Runs the callables of a yes, and begins the turn that has their results. False if nothing is to be
        answered."""
        if self.stopped or not self._answers_itself:
            return False
        work = asyncio.ensure_future(results_of(self.calls, self._callables))
        stop = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() or self._stopped.is_set():
                return False
            return await self._line.begin(self, self._line.answer(self, work.result()))
        except YapTextError as error:
            self._error = error
            raise
        finally:
            work.cancel()
            stop.cancel()


def heard(heard_text: str | None, heard_chars: int | None) -> dict[str, str | int]:
    """The fields of a cancel."""
    fields: dict[str, str | int | None] = {"heard_text": heard_text, "heard_chars": heard_chars}
    return {name: value for name, value in fields.items() if value is not None}
