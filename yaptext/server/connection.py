"""One socket: a receive loop that never waits for a send, a generation or an engine."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from starlette.websockets import WebSocket

from yaptext.dialogue.session import Session
from yaptext.dialogue.turn import Turn
from yaptext.errors import BadMessage, Internal, RateLimited, SlowClient, WireError
from yaptext.server.outbox import WRITE_NOW, Outbox
from yaptext.wire.messages import (
    Cancel,
    ClientMessage,
    Done,
    End,
    Error,
    Ping,
    Pong,
    ServerMessage,
    SetPersona,
    Start,
    WarmHistory,
    WarmPersona,
    decode,
    encode,
    error_frame,
)

if TYPE_CHECKING:
    from yaptext.dialogue.stage import Stage
    from yaptext.server.keys import Account

_log = structlog.get_logger(__name__)
_CLOSE_IDLE, _CLOSE_NORMAL = 4000, 1000
_FLUSH_TIMEOUT_S = 2.0
"""How long a closing socket may take to accept what still waits."""
_ABORT_TIMEOUT_S = 10.0
"""How long an engine may take to let go of a turn before its task is cancelled again."""
_MAX_WARMS = 4
_MAX_TURNS = 8
"""Turns of one socket that are not over yet: one runs, others have been told to end."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a connection ends. `code` is None where the client has gone already."""

    code: int | None
    reason: str
    error: Error | None = None


class Connection:
    """One accepted socket from its first frame to its close. Tasks: receiver, writer, turns and warm-ups."""

    def __init__(self, websocket: WebSocket, stage: Stage, account: Account) -> None:
        self._socket, self._stage, self._account = websocket, stage, account
        settings = stage.settings
        self._outbox = Outbox(
            max_bytes=settings.send_queue_bytes,
            flush_s=settings.stream_flush_ms / 1000,
            on_overflow=self._overflow,
            write_now=websocket.scope.get("extensions", {}).get(WRITE_NOW),
        )
        self._session: Session | None = None
        self._turn: Turn | None = None
        self._turns: set[asyncio.Task[None]] = set()
        self._warms: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    @property
    def busy(self) -> bool:
        """True while a turn is running or waits to run."""
        return self._turn is not None and not self._turn.finished.is_set()

    def end(self, error: WireError) -> None:
        """Ends the connection with an error frame and its close code. The first reason counts."""
        self._end(Ending(error.close_code, error.code, error_frame(error)))

    def fail(self, error: WireError) -> None:
        """The turn that runs or waits ends with this error."""
        if self._turn is not None:
            self._turn.fail(error)

    async def serve(self) -> Ending:
        """Runs until the client leaves or `end` is called; then every turn is over and the socket closed."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            receiver = group.create_task(self._receive())
            writer = group.create_task(self._write())
            ending = await self._ending
            receiver.cancel()
            if self._turn is not None and ending.code is not None:
                self._turn.cancel()  # its `done` still goes out
            for task in self._warms | (self._turns if ending.code is None else set()):
                task.cancel()
            if self._turns:
                _, stuck = await asyncio.wait(self._turns, timeout=_ABORT_TIMEOUT_S)
                for task in stuck:
                    task.cancel()
            await self._close(ending, writer)
        return ending

    # --- in

    async def _receive(self) -> None:
        idle_s = self._stage.settings.idle_timeout_s or None
        for number in itertools.count(1):
            if number % 32 == 0:
                await asyncio.sleep(0)  # a burst of frames arrives without a pause
            try:
                async with asyncio.timeout(idle_s):
                    event = await self._socket.receive()
            except TimeoutError:
                if self.busy:
                    continue
                self._end(Ending(_CLOSE_IDLE, "idle"))
                return
            if event["type"] == "websocket.disconnect":
                self._end(Ending(None, "disconnected"))
                return
            if self._ending.done():
                return
            frame = event.get("text")
            self._handle(event["bytes"] if frame is None else frame)

    def _handle(self, frame: str | bytes) -> None:
        """Acts on one frame at once. Work that takes time becomes a task."""
        try:
            self._account.spend("messages")
            self._dispatch(decode(frame))
        except WireError as error:
            self._send(error_frame(error))
        except Exception:
            _log.exception("frame.crashed")
            self.end(Internal("The frame could not be handled by a fault of the service."))

    def _dispatch(self, message: ClientMessage) -> None:
        match message:
            case Start():
                self._account.spend("turns")
                self._start(message)
            case Cancel():
                self._account.spend("cancels")
                self._cancel(message)
            case SetPersona():
                self._set_persona(message)
            case WarmPersona() | WarmHistory():
                self._account.spend("turns")
                self._warm(message)
            case Ping():
                self._send(Pong())
            case End():
                self._end(Ending(_CLOSE_NORMAL, "end"))

    def _start(self, message: Start) -> None:
        if len(self._turns) >= _MAX_TURNS:
            raise RateLimited(f"{len(self._turns)} turns wait to end; limit is {_MAX_TURNS}", retry_after_ms=200)
        session = self._stage.sessions.open((self._account.name, message.session_id))
        turn = Turn(self._stage, session, message, send=self._send, tokens=self._outbox.open, after=self._turn)
        self._session, self._turn = session, turn
        task = self._group.create_task(self._run(turn))
        self._turns.add(task)
        task.add_done_callback(self._turns.discard)
        task.add_done_callback(lambda _: turn.abandon())

    async def _run(self, turn: Turn) -> None:
        try:
            await turn.run()
        except WireError as error:
            self.end(error)

    def _cancel(self, message: Cancel) -> None:
        if self._turn is not None and not self._turn.over:
            self._turn.cancel(message.heard_chars)
            return
        current = None if self._session is None else self._session.current
        if self._session is not None and message.heard_chars is not None and (current is None or current.over):
            # The reply was sent whole, but playback was cut short.
            self._session.transcript.cut_reply(message.heard_chars)
            self._stage.sessions.keep(self._session)
        self._send(Done(turn=0, cancelled=True, cancel_ms=0.0, tokens_sent=0))

    def _set_persona(self, message: SetPersona) -> None:
        if message.session_id is not None:
            session = self._stage.sessions.open((self._account.name, message.session_id))
        elif self._session is not None:
            session = self._session
        else:
            raise BadMessage("Object missing required field session_id, since no start came before - at $")
        session.persona = self._stage.merge(session.persona, message)
        self._session = self._session or session
        self._stage.sessions.keep(session)
        self._send(self._stage.ack("set_persona", session, session.persona, session.turns, session.seed))

    def _warm(self, message: WarmPersona | WarmHistory) -> None:
        if len(self._warms) >= _MAX_WARMS:
            raise RateLimited(f"{len(self._warms)} warm-ups are running; limit is {_MAX_WARMS}", retry_after_ms=500)
        session = self._session
        if message.session_id is not None:
            session = self._stage.sessions.find((self._account.name, message.session_id))
        task = self._group.create_task(self._run_warm(message, session))
        self._warms.add(task)
        task.add_done_callback(self._warms.discard)

    async def _run_warm(self, message: WarmPersona | WarmHistory, session: Session | None) -> None:
        try:
            self._send(await self._stage.warm(message, session, self._account.name))
        except WireError as error:
            self._send(error_frame(error))
        except Exception:
            _log.exception("warm.crashed")
            self.end(Internal("The warm-up failed by a fault of the service."))

    # --- out

    def _send(self, message: ServerMessage) -> None:
        if isinstance(message, Error):
            self._stage.metrics.errors.labels(message.error_code).inc()
        self._outbox.put(message)

    async def _write(self) -> None:
        try:
            await self._outbox.write(self._socket.send_text)
        except Exception as error:  # whatever the transport raises, the client is gone
            self._end(Ending(None, type(error).__name__))

    def _overflow(self) -> None:
        limit = self._stage.settings.send_queue_bytes
        self.end(SlowClient(f"more than {limit} bytes wait to be read; limit is {limit}"))

    def _end(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    async def _close(self, ending: Ending, writer: asyncio.Task[None]) -> None:
        """Writes what still waits, then the close frame; a client that does not read gets neither wait."""
        slow = ending.error is not None and ending.error.error_code == SlowClient.code
        if ending.code is not None and not slow:
            if ending.error is not None:
                self._send(ending.error)
            self._outbox.finish()
            await asyncio.wait([writer], timeout=_FLUSH_TIMEOUT_S)
        writer.cancel()
        if ending.code is None:
            return
        try:
            if slow and ending.error is not None:
                await self._socket.send(
                    {"type": "websocket.send", "text": encode(ending.error).decode(), "urgent": True}
                )
            await self._socket.close(ending.code, ending.reason)
        except Exception as error:  # the client left meanwhile
            _log.debug("close.failed", error=type(error).__name__)
