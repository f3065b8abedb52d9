"""The client without `async`: the same names, on a thread with a loop of its own for each connection.

Its calls may come from several threads; a turn is iterated by one. A callable of a tool runs in another thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar, Unpack

from yaptext.client import client
from yaptext.client import turn as turns
from yaptext.client.errors import Refused
from yaptext.client.events import Event
from yaptext.client.fields import Persona, TurnFields, Warming
from yaptext.client.link import Ticket
from yaptext.wire.frames import (
    Ack,
    Done,
    Forgotten,
    IdentifiedCall,
    SamplingFields,
    SessionState,
    Timings,
    Token,
    ToolCall,
    Usage,
    Warmed,
)

_T = TypeVar("_T")


@contextmanager
def connect(
    url: str,
    key: str | None = None,
    *,
    ticket: Ticket | None = None,
    session_id: str | None = None,
    reconnect: bool = True,
    give_up_s: float = 300.0,
    **options: Any,
) -> Iterator[Yap]:
    """As `yaptext.client.connect`."""
    with _Loop() as loop:
        more = {"session_id": session_id, "reconnect": reconnect, "give_up_s": give_up_s, **options}
        opening = client.connect(url, key, ticket=ticket, **more)
        yap = loop.run(opening.__aenter__())
        try:
            yield Yap(yap, loop)
        finally:
            loop.run(opening.__aexit__(None, None, None))


class _Loop:
    """An event loop in a thread."""

    def __enter__(self) -> _Loop:
        self._loop, self._open, self._lock = asyncio.new_event_loop(), True, threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="yaptext.client", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open = False  # nothing is added to the loop from here on
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        """What other threads still wait for comes back, cancelled."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Waits for it. Ctrl-C cancels it. Raises `Refused` after the end."""
        with self._lock:
            if not self._open:
                work.close()
                raise Refused("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Refused("the client is closed") from None
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        """In the thread of the loop."""

        async def called() -> Any:
            return function(*arguments, **named)

        return self.run(called())


class Yap:
    """As `yaptext.client.Yap`."""

    def __init__(self, yap: client.Yap, loop: _Loop) -> None:
        self._yap, self._loop = yap, loop

    @property
    def session_id(self) -> str:
        return self._yap.session_id

    def turn(self, text: str | None, **fields: Unpack[TurnFields]) -> Turn:
        return Turn(self._loop.call(self._yap.turn, text, **fields), self._loop)

    def tool_result(
        self,
        turn: Turn,
        results: Mapping[str, Any],
        *,
        sampling: SamplingFields | Mapping[str, Any] | None = None,
    ) -> Turn:
        return Turn(self._loop.run(self._yap.tool_result(turn.inner, results, sampling=sampling)), self._loop)

    def warm(self, **fields: Unpack[Warming]) -> Warmed:
        return self._loop.run(self._yap.warm(**fields))

    def set_persona(self, **fields: Unpack[Persona]) -> Ack:
        return self._loop.run(self._yap.set_persona(**fields))

    def get_session(self) -> SessionState:
        return self._loop.run(self._yap.get_session())

    def forget(self) -> Forgotten:
        return self._loop.run(self._yap.forget())

    def ping(self) -> float:
        return self._loop.run(self._yap.ping())


class Turn:
    """As `yaptext.client.Turn`."""

    def __init__(self, inner: turns.Turn, loop: _Loop) -> None:
        self.inner, self._loop = inner, loop

    def __enter__(self) -> Turn:
        self._loop.run(self.inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self.inner.__aexit__(kind, error, trace))

    def begin(self) -> Turn:
        self._loop.run(self.inner.begin())
        return self

    def __iter__(self) -> Turn:
        return self

    def __next__(self) -> Event:
        event = self._loop.run(self._next())
        if event is None:
            raise StopIteration
        return event

    async def _next(self) -> Event | None:
        return await anext(self.inner, None)

    @property
    def text_stream(self) -> Iterator[str]:
        for event in self:
            if isinstance(event, Token):
                yield event.text

    def result(self) -> Turn:
        self._loop.run(self.inner.result())
        return self

    def cancel(self, *, heard_text: str | None = None, heard_chars: int | None = None) -> None:
        self._loop.run(self.inner.cancel(heard_text=heard_text, heard_chars=heard_chars))

    @property
    def ack(self) -> Ack | None:
        return self.inner.ack

    @property
    def decisions(self) -> list[ToolCall]:
        return self.inner.decisions

    @property
    def dones(self) -> list[Done]:
        return self.inner.dones

    @property
    def number(self) -> int:
        return self.inner.number

    @property
    def text(self) -> str:
        return self.inner.text

    @property
    def decision(self) -> ToolCall | None:
        return self.inner.decision

    @property
    def calls(self) -> list[IdentifiedCall]:
        return self.inner.calls

    @property
    def usage(self) -> Usage | None:
        return self.inner.usage

    @property
    def timings(self) -> Timings | None:
        return self.inner.timings

    @property
    def finish_reason(self) -> str | None:
        return self.inner.finish_reason

    @property
    def cancelled(self) -> bool:
        return self.inner.cancelled

    @property
    def over(self) -> bool:
        return self.inner.over
