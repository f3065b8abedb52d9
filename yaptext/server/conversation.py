"""The conversation of one client, whatever door it came through: what each of its messages does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol

import structlog
from msgspec import UNSET

from yaptext.dialogue import warming
from yaptext.dialogue.heard import Heard
from yaptext.dialogue.incoming import bounded, request_of
from yaptext.dialogue.outgoing import Sink
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.dialogue.turn import Turn
from yaptext.engine.base import whose
from yaptext.errors import BadMessage, Internal, RateLimited, WireError
from yaptext.server.access.accounts import Account
from yaptext.wire.frames import (
    Cancel,
    ClientMessage,
    Done,
    End,
    Forget,
    GetSession,
    Ping,
    Pong,
    ServerMessage,
    SetPersona,
    Start,
    ToolResult,
    WarmHistory,
    WarmPersona,
    error_frame,
)

_log = structlog.get_logger(__name__)
_ABORT_TIMEOUT_S = 10.0
"""How long an engine may take to let go of a turn before its task is cancelled again."""
_MAX_WARMS = 4


class Client(Sink, Protocol):
    """The other side, as its door presents it."""

    @property
    def is_ending(self) -> bool:
        """True from the first reason to end on."""
        ...

    def end(self, error: WireError) -> None:
        """Ends the connection with an error. The first reason counts."""
        ...

    def leave(self) -> None:
        """Ends the connection, since the client asked for it."""
        ...

    def rests(self) -> None:
        """Called when a turn has ended and none runs or waits."""
        ...


class Conversation:
    """The turns of one client, their session, and its warm-ups."""

    def __init__(self, runtime: Runtime, account: Account, client: Client) -> None:
        self._runtime, self._account, self._client = runtime, account, client
        self.session: Session | None = None
        self._persona: Persona | None = None
        """The one that was warmed or set last."""
        self.turn: Turn | None = None
        self._turns: set[asyncio.Task[None]] = set()
        self._warms: set[asyncio.Task[None]] = set()
        self._one_warm = asyncio.Lock()
        self._others: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """True while a turn is running or waits to run."""
        return self.turn is not None and not self.turn.finished.is_set()

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Its tasks will be of this group; work of the caller's task counts as its key's from here on."""
        self._group = group
        whose.set(self._account.name)

    async def stop(self, *, gone: bool) -> None:
        """Returns when every turn is over. The last one still sends its `done`, unless the client has gone."""
        if self.turn is not None and not gone:
            self.turn.cancel()
        for task in self._warms | self._others | (self._turns if gone else set()):
            task.cancel()
        if self._turns:
            _, stuck = await asyncio.wait(self._turns, timeout=_ABORT_TIMEOUT_S)
            for task in stuck:
                task.cancel()

    async def handle(self, message: ClientMessage, ignored: Sequence[str] = ()) -> None:
        """Acts on one message at once. Work that takes time becomes a task; only the size of a persona is waited for,
        since whether it is taken decides what the next message means."""
        if message.cost is not None:
            self._account.spend(message.cost)
        await HANDLERS[type(message)](self, message, ignored)

    # --- turns

    async def start(self, message: Start | ToolResult, ignored: Sequence[str]) -> None:
        request = await request_of(self._runtime, message, self._account.name, self._account.spend, ignored)
        session = self._runtime.sessions.open((self._account.name, message.session_id))
        turn = Turn(self._runtime, session, request, self._client, after=self.turn)
        self.session, self.turn, self._persona = session, turn, session.persona
        task = self._task(self.run_turn(turn), self._turns)
        task.add_done_callback(lambda _: self._over(turn))

    def _over(self, turn: Turn) -> None:
        turn.abandon()
        if not self.busy:
            self._client.rests()

    async def run_turn(self, turn: Turn) -> None:
        """The task of a turn: to its end, and what comes of how it ended."""
        try:
            await turn.run()
        except WireError as error:
            self._client.end(error)
        else:
            session = turn.session
            if turn.warms_next and session.current is None and not self._client.is_ending:
                session.warming = self._task(self._warm_next(session), self._others)

    async def _warm_next(self, session: Session) -> None:
        with suppress(WireError):  # the next turn reports it
            await warming.warm_next(self._runtime, session)

    async def cancel(self, message: Cancel, _: Sequence[str]) -> None:
        heard = Heard.of(message)
        if message.session_id is None and self.turn is not None and not self.turn.over:
            self.turn.cancel(heard)
            return
        session = self._session(message.session_id)
        current = None if session is None else session.current
        if message.session_id is not None and current is not None and not current.over:
            current.cancel(heard)
            if current is not self.turn:  # its own done goes to the socket that it runs on
                self._client.send(Done(turn=current.number, session_id=current.session.session_id, cancelled=True))
            return
        if session is not None and heard is not None and (current is None or current.over):
            # The reply was sent whole, but playback was cut short.
            session.transcript.cut_reply(heard.chars, heard.text, self._runtime.settings.interrupted_mark)
            self._runtime.sessions.keep(session)
        session_id = UNSET if session is None else session.session_id
        self._client.send(Done(turn=0, session_id=session_id, cancelled=True, cancel_ms=0.0, tokens_sent=0))

    # --- sessions

    async def set_persona(self, message: SetPersona, _: Sequence[str]) -> None:
        if message.session_id is not None:
            key = (self._account.name, message.session_id)
        elif self.session is not None:
            key = self.session.key
        else:
            raise BadMessage("Object missing required field session_id, since no start came before - at $")
        found = self._runtime.sessions.find(key)
        if found is None:
            self._account.spend("turns")  # a session is worth as much
        message = bounded(self._runtime, message)
        await self._runtime.check_persona((found.persona if found else Persona()).merge(message))
        session = self._runtime.sessions.open(key)
        session.persona = self._persona = session.persona.merge(message)
        self.session = self.session or session
        self._runtime.sessions.keep(session)
        self._client.send(self._runtime.ack("set_persona", session, session.persona, session.turns, session.seed))

    async def get_session(self, message: GetSession, _: Sequence[str]) -> None:
        session = self._session(message.session_id)
        self._client.send(self._runtime.describe(self._account.name, message.session_id, session))

    async def forget(self, message: Forget, _: Sequence[str]) -> None:
        if self.session is not None and self.session.session_id == message.session_id:
            self.session = self._persona = None
        forgotten = self._runtime.forget(self._account.name, message.session_id)  # now; the file takes longer
        self._task(self._send(forgotten), self._others)

    async def _send(self, answer: Awaitable[ServerMessage]) -> None:
        self._client.send(await answer)

    def _session(self, session_id: str | None) -> Session | None:
        """The one that a message names, or else the one that the conversation goes on with."""
        return self.session if session_id is None else self._runtime.sessions.find((self._account.name, session_id))

    # --- the rest

    async def warm(self, message: WarmPersona | WarmHistory, _: Sequence[str]) -> None:
        if len(self._warms) >= _MAX_WARMS:
            raise RateLimited(f"{len(self._warms)} warm-ups are running; limit is {_MAX_WARMS}", retry_after_ms=500)
        message = bounded(self._runtime, message)
        session = self._session(message.session_id)
        self._task(self._run_warm(message, session), self._warms)

    async def _run_warm(self, message: WarmPersona | WarmHistory, session: Session | None) -> None:
        try:
            async with self._one_warm:  # each may go by the persona of the one before
                warmed, self._persona = await warming.warm(
                    self._runtime, message, session, self._account.name, self._persona
                )
            self._client.send(warmed)
        except WireError as error:
            self._client.send(error_frame(error, session_id=message.session_id))
        except Exception:
            _log.exception("warm.crashed")
            self._client.end(Internal("The warm-up failed by a fault of the service."))

    async def ping(self, _: Ping, __: Sequence[str]) -> None:
        self._client.send(Pong())

    async def leave(self, _: End, __: Sequence[str]) -> None:
        self._client.leave()

    def _task(self, work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        """Work that ends with the conversation."""
        task = self._group.create_task(work)
        among.add(task)
        task.add_done_callback(among.discard)
        return task


HANDLERS: dict[type[ClientMessage], Callable[..., Awaitable[None]]] = {
    Start: Conversation.start,
    ToolResult: Conversation.start,
    Cancel: Conversation.cancel,
    SetPersona: Conversation.set_persona,
    GetSession: Conversation.get_session,
    Forget: Conversation.forget,
    WarmPersona: Conversation.warm,
    WarmHistory: Conversation.warm,
    Ping: Conversation.ping,
    End: Conversation.leave,
}
"""Each gets a message of its type, and the names of its unknown fields."""
