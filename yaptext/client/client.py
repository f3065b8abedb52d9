"""One user's conversation: `connect`, and what is said on the connection."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar, Unpack, cast

import websockets

from yaptext.client import fields as said
from yaptext.client.errors import (
    BadMessage,
    ConnectionLost,
    EngineFailed,
    GoingAway,
    NotDeployed,
    ServiceError,
    TextTooLong,
    UnknownPersona,
    YapTextError,
    error_of,
)
from yaptext.client.fields import Persona, TurnFields, Warming
from yaptext.client.link import Link, Ticket
from yaptext.client.tools import Callables, split
from yaptext.client.turn import Turn, heard
from yaptext.wire.frames import (
    Ack,
    Done,
    Error,
    Final,
    Forgotten,
    Pong,
    SamplingFields,
    ServerMessage,
    SessionState,
    Token,
    ToolCall,
    ToolResultItem,
    Warmed,
)

_T = TypeVar("_T")
_Answer = TypeVar("_Answer", bound=ServerMessage)
_OF_WARM_UPS = (EngineFailed, NotDeployed)
_OF_BOTH = (BadMessage, TextTooLong, UnknownPersona)
"""Errors of a warm-up that the service has taken. A start can be refused with those of `_OF_BOTH`, too."""
_PING = '{"type":"ping"}'
_ANSWER_WITHIN_S, _CANCELLED_WITHIN_S = 30.0, 5.0
"""The service answers a cancel at once. An ack may wait until an engine lets go of a turn (10 s), or for the grammar
of new tools (10 s). If an answer takes longer, the socket counts as lost, although it is open."""


@asynccontextmanager
async def connect(
    url: str,
    key: str | None = None,
    *,
    ticket: Ticket | None = None,
    session_id: str | None = None,
    reconnect: bool = True,
    give_up_s: float = 300.0,
    **options: Any,
) -> AsyncIterator[Yap]:
    """A conversation at `url` (`ws://` or `wss://`). The key travels in a header. `ticket` replaces the
    key: a function that returns a new ticket for each connection. `session_id` resumes a session; without it the client
    makes one, and keeps it over reconnects.

    If the socket breaks, the client opens another: after `retry_after_ms` if the service says it, else after 0.25 s,
    doubled up to 8 s. Calls wait for it, and fail after `give_up_s`. The turn that was running fails with a retryable
    error. The first connection is not tried again. `options` are further ones of `websockets.connect`, as `ssl` and
    `proxy`.

    Raises `Refused` if nothing answers, or the `ServiceError` that the service refuses with."""
    yap = Yap(url, key, ticket, session_id=session_id, reconnect=reconnect, give_up_s=give_up_s, options=options)
    await yap.open()
    try:
        yield yap
    finally:
        await yap.close()


class _Exchange:
    """A frame that waits for its answer. `turn` is the one that it begins or cancels. `fences` is a warm-up that was
    sent just before: the answer says that the service has taken or refused that."""

    def __init__(self, expects: type[ServerMessage], turn: Turn | None = None, fences: _Exchange | None = None) -> None:
        self.expects, self.turn, self.fences = expects, turn, fences
        self.answer: asyncio.Future[ServerMessage] = asyncio.get_running_loop().create_future()

    @property
    def waits(self) -> bool:
        return not self.answer.done()

    def settle(self, answer: ServerMessage) -> None:
        if self.waits:
            self.answer.set_result(answer)

    def fail(self, error: YapTextError) -> None:
        if self.waits:
            self.answer.set_exception(error)
            self.answer.exception()  # it may be that nobody waits


class Yap:
    """A conversation with one session of the service. Its calls may come from several tasks."""

    def __init__(
        self,
        url: str,
        key: str | None,
        ticket: Ticket | None,
        *,
        session_id: str | None,
        reconnect: bool,
        give_up_s: float,
        options: dict[str, Any],
    ) -> None:
        self.session_id = session_id or uuid.uuid4().hex
        self._link = Link(
            url,
            key,
            ticket,
            reconnect=reconnect,
            give_up_s=give_up_s,
            options=options,
            on_event=self._event,
            on_lost=self._lost,
        )
        self._door = asyncio.Lock()
        """One frame at a time waits for its answer: an error names no frame, so it has to be clear whose it is."""
        self._asking: _Exchange | None = None
        self._warming: _Exchange | None = None
        """A warm-up that the service has taken. It does not keep a turn waiting."""
        self._current: Turn | None = None
        self._callables: Callables = {}
        self._awaits = False
        self._unclear: ServiceError | None = None
        """An error that may be the warm-up's or that of what is asked: the next answer says it."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        await self._link.open()

    async def close(self) -> None:
        await self._link.close()
        for task in self._tasks:
            task.cancel()

    # --- turns

    def turn(self, text: str | None, **fields: Unpack[TurnFields]) -> Turn:
        """`async with yap.turn("...") as turn: async for event in turn`. A turn that runs is ended by a new one. None
        lets the assistant speak. The fields are those of `start`; tools may come with callables, which the turn then
        runs (`Turn`). The session keeps tools and their callables until `tools` is given again."""
        said.check_names(fields, TurnFields)
        given: dict[str, Any] = dict(fields)
        if "tools" in given:
            schemas, self._callables = split(given.pop("tools"))
            self._awaits = schemas is None and bool(self._callables)
            given["tools"] = schemas
        if self._awaits:
            given.setdefault("await_tools", True)
        frame = said.frame("start", session_id=self.session_id, user_utterance=text, **given)
        return Turn(self, frame, self._callables)

    async def tool_result(
        self,
        turn: Turn,
        results: Mapping[str, Any],
        *,
        sampling: SamplingFields | Mapping[str, Any] | None = None,
    ) -> Turn:
        """Begins the turn that answers with the results of `turn.calls`: the id of each call, and a text or JSON."""
        items = [ToolResultItem(id=call, content=content) for call, content in results.items()]
        more = {} if sampling is None else {"sampling": sampling}
        return await Turn(self, self.answer(turn, items, **more), self._callables).begin()

    # --- the session

    async def warm(self, **fields: Unpack[Warming]) -> Warmed:
        """Has the service compute what the next turn begins with: the history if there is one, else the persona. A turn
        may begin meanwhile."""
        said.check_names(fields, Warming)
        tag = "warm_history" if "history" in fields else "warm_persona"
        frame = said.frame(tag, session_id=self.session_id, **fields)
        await self._enter()
        while self._warming is not None and self._warming.waits:
            self._door.release()
            await asyncio.wait([self._warming.answer])
            await self._enter()
        self._warming = warming = _Exchange(Warmed)
        await asyncio.shield(self._exchange(_Exchange(Pong, fences=warming), frame, _PING))
        return cast(Warmed, await asyncio.shield(warming.answer))

    async def set_persona(self, **fields: Unpack[Persona]) -> Ack:
        """For all later turns; None clears a field."""
        said.check_names(fields, Persona)
        return await self._ask(said.frame("set_persona", session_id=self.session_id, **fields), Ack)

    async def get_session(self) -> SessionState:
        return await self._ask(said.frame("get_session", session_id=self.session_id), SessionState)

    async def forget(self) -> Forgotten:
        """Returns when nothing of the session is kept any more. A running turn ends."""
        return await self._ask(said.frame("forget", session_id=self.session_id), Forgotten)

    async def ping(self) -> float:
        """Milliseconds to the service and back."""
        begun = time.perf_counter()
        await self._ask(_PING, Pong)
        return (time.perf_counter() - begun) * 1000

    # --- what turns ask for

    async def begin(self, turn: Turn, frame: str) -> bool:
        await self._enter()
        if turn.stopped:
            self._door.release()
            return False
        if self._current is not None and self._current is not turn:
            self._current.stop()
        try:
            await asyncio.shield(self._exchange(_Exchange(Ack, turn), frame))
        except asyncio.CancelledError:  # the service may have begun it
            turn.stop()
            self._spawn(self.cancel(turn, heard_text=None, heard_chars=None))
            raise
        except GoingAway as error:  # it did not begin it: the next socket takes it
            self._link.give_up(error)
            return await self.begin(turn, frame)
        return True

    async def cancel(self, turn: Turn, *, heard_text: str | None, heard_chars: int | None) -> None:
        fields = heard(heard_text, heard_chars)
        if turn.over and not fields:
            return
        await self._enter()
        if self._current is not turn or (turn.over and not fields):
            self._door.release()
            return
        whose = {"session_id": self.session_id} if turn.over else {}  # another socket may have been opened since
        frame = said.frame("cancel", **fields, **whose)
        await asyncio.shield(self._exchange(_Exchange(Done, turn), frame))

    def answer(self, turn: Turn, results: list[ToolResultItem], **more: Any) -> str:
        return said.frame("tool_result", session_id=self.session_id, turn=turn.number, results=results, **more)

    # --- one frame and its answer

    async def _ask(self, frame: str, expects: type[_Answer]) -> _Answer:
        await self._enter()
        return cast(_Answer, await asyncio.shield(self._exchange(_Exchange(expects), frame)))

    async def _enter(self) -> None:
        """Waits for the door and for a socket; the caller has to release the door, or to begin an exchange at once."""
        await self._door.acquire()
        try:
            await self._link.ready()
        except BaseException:
            self._door.release()
            raise

    def _exchange(self, exchange: _Exchange, *frames: str) -> asyncio.Task[ServerMessage]:
        """Sends the frames; done at the answer, which opens the door. A caller that leaves before does not change
        that."""
        self._asking = exchange
        return self._spawn(self._answered(exchange, frames))

    async def _answered(self, exchange: _Exchange, frames: Sequence[str]) -> ServerMessage:
        within_s = _CANCELLED_WITHIN_S if exchange.expects is Done else _ANSWER_WITHIN_S
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    return await self._say(exchange, frames)
            self._link.give_up(ConnectionLost(1006, f"no answer in {within_s:g} s"))
            return await exchange.answer
        finally:
            self._asking = None
            self._door.release()

    async def _say(self, exchange: _Exchange, frames: Sequence[str]) -> ServerMessage:
        socket = self._link.socket
        with suppress(websockets.ConnectionClosed):  # `_lost` is called then
            for frame in frames:
                if socket is not None and exchange.waits:
                    await socket.send(frame)
        return await asyncio.shield(exchange.answer)

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it may be that nobody waits any more

    # --- what arrives

    def _event(self, event: ServerMessage) -> None:
        asking, turn = self._asking, self._current
        match event:
            case Ack() if event.for_ != "set_persona":
                if asking is not None and asking.turn is not None:
                    self._current = asking.turn
                    asking.turn.take(event)
                    asking.settle(event)
            case ToolCall() | Token() | Final():
                if turn is not None and event.turn == turn.number:
                    turn.take(event)
            case Done():
                if turn is not None and event.turn == turn.number and not turn.over:
                    turn.take(event)
                if (
                    asking is not None
                    and asking.expects is Done
                    and event.turn in (0, asking.turn and asking.turn.number)
                ):
                    asking.settle(event)
            case Error():
                self._refused(event)
            case Warmed() if self._warming is not None and self._warming.waits:
                self._warming.settle(event)
            case Warmed() if asking is not None and asking.fences is not None:
                asking.settle(event)  # the ping behind it was refused
            case _:
                if asking is not None and isinstance(event, asking.expects):
                    asking.settle(event)
        self._clear()

    def _refused(self, event: Error) -> None:
        """An error belongs to the turn that it names, else to what waits for its answer."""
        error, asking, turn, warming = error_of(event), self._asking, self._current, self._warming
        if asking is not None and not asking.waits:
            asking = None
        if event.turn and turn is not None and event.turn == turn.number and not turn.over:
            turn.fail(error)
            if asking is not None and asking.turn is turn:
                asking.settle(event)
        elif asking is not None and asking.fences is not None and asking.fences.waits:
            asking.fences.fail(error)
        elif warming is None or not warming.waits:
            if asking is not None:
                asking.fail(error)
        elif asking is None or isinstance(error, _OF_WARM_UPS):
            warming.fail(error)
        elif isinstance(error, _OF_BOTH) and self._unclear is None:
            self._unclear = error
        else:
            asking.fail(error)

    def _clear(self) -> None:
        """What has been answered since is not what an unclear error was about."""
        if self._unclear is not None and self._warming is not None and self._asking is not None:
            if not self._asking.waits:
                self._warming.fail(self._unclear)
            elif not self._warming.waits:
                self._asking.fail(self._unclear)
            else:
                return
            self._unclear = None

    def _lost(self, reason: YapTextError) -> None:
        self._unclear = None
        for exchange in filter(None, (self._asking, self._warming)):
            exchange.fail(reason)
        if self._current is not None:
            self._current.fail(reason)
