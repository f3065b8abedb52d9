"""One socket: a receive loop that never waits for a send, a generation or an engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import structlog
from msgspec import UNSET
from starlette.websockets import WebSocket

from yaptext.dialogue import warming
from yaptext.dialogue.heard import Heard
from yaptext.dialogue.incoming import bounded
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.session import Session
from yaptext.dialogue.turn import Turn
from yaptext.engine.base import whose
from yaptext.errors import BadMessage, Internal, RateLimited, SlowClient, WireError
from yaptext.server.ws.send_queue import WRITE_NOW, SendQueue
from yaptext.wire.frames import (
    Cancel,
    ClientMessage,
    Done,
    End,
    Error,
    Forget,
    Frame,
    GetSession,
    Ping,
    Pong,
    ServerMessage,
    SetPersona,
    Start,
    ToolResult,
    WarmHistory,
    WarmPersona,
    encode,
    error_frame,
    read,
    read_in_steps,
)

if TYPE_CHECKING:
    from yaptext.dialogue.runtime import Runtime
    from yaptext.server.access.accounts import Account

_log = structlog.get_logger(__name__)
_CLOSE_IDLE, _CLOSE_NORMAL = 4000, 1000
_FLUSH_TIMEOUT_S = 2.0
"""How long a closing socket may take to accept what still waits."""
_ABORT_TIMEOUT_S = 10.0
"""How long an engine may take to let go of a turn before its task is cancelled again."""
_MAX_WARMS = 4
_LARGE_BYTES = 32_768
"""Frames over this are read one in a round of the loop, of all sockets: each takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a connection ends. `code` is None where the client has gone already."""

    code: int | None
    reason: str
    error: Error | None = None


class Connection:
    """One accepted socket from its first frame to its close. Tasks: receiver, writer, turns and warm-ups."""

    def __init__(self, websocket: WebSocket, runtime: Runtime, account: Account) -> None:
        self._socket, self._runtime, self._account = websocket, runtime, account
        settings = runtime.settings
        self._send_queue = SendQueue(
            max_bytes=settings.send_queue_bytes,
            flush_s=settings.stream_flush_ms / 1000,
            on_overflow=self._overflow,
            write_now=websocket.scope.get("extensions", {}).get(WRITE_NOW),
        )
        self.session: Session | None = None
        self._persona: Persona | None = None
        """The one that was warmed or set last."""
        self.turn: Turn | None = None
        self._turns: set[asyncio.Task[None]] = set()
        self._warms: set[asyncio.Task[None]] = set()
        self._one_warm = asyncio.Lock()
        self._others: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    @property
    def busy(self) -> bool:
        """True while a turn is running or waits to run."""
        return self.turn is not None and not self.turn.finished.is_set()

    @property
    def session_id(self) -> str | None:
        """Of its last turn."""
        return None if self.turn is None else self.turn.session.session_id

    @property
    def is_ending(self) -> bool:
        """True from the first reason to end on."""
        return self._ending.done()

    def end(self, error: WireError) -> None:
        """Ends the connection with an error frame and its close code. The first reason counts."""
        self._end(Ending(error.close_code, error.code, error_frame(error)))

    def fail(self, error: WireError) -> None:
        """The turn that runs or waits ends with this error."""
        if self.turn is not None:
            self.turn.fail(error)

    async def serve(self) -> Ending:
        """Runs until the client leaves or `end` is called; then every turn is over and the socket closed."""
        whose.set(self._account.name)
        async with asyncio.TaskGroup() as group:
            self._group = group
            receiver = group.create_task(self._receive())
            writer = group.create_task(self._write())
            ending = await self._ending
            receiver.cancel()
            if self.turn is not None and ending.code is not None:
                self.turn.cancel()  # its `done` still goes out
            for task in self._warms | self._others | (self._turns if ending.code is None else set()):
                task.cancel()
            if self._turns:
                _, stuck = await asyncio.wait(self._turns, timeout=_ABORT_TIMEOUT_S)
                for task in stuck:
                    task.cancel()
            await self._close(ending, writer)
        return ending

    # --- in

    async def _receive(self) -> None:
        idle_s = self._runtime.settings.idle_timeout_s or None
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
            if self.is_ending:
                return
            frame = event.get("text")
            await self._handle(event["bytes"] if frame is None else frame)

    async def _handle(self, frame: str | bytes) -> None:
        """Acts on one frame at once. Work that takes time becomes a task; only the size of a persona is waited for,
        since whether it is taken decides what the next frame means."""
        message: ClientMessage | None = None
        try:
            self._account.spend("messages")
            message, ignored = await self._read_large(frame) if len(frame) > _LARGE_BYTES else read(frame)
            await self._dispatch(message, ignored)
        except WireError as error:
            session_id = getattr(message, "session_id", None)
            self.send(error_frame(error, session_id=UNSET if session_id is None else session_id))
        except Exception:
            _log.exception("frame.crashed")
            self.end(Internal("The frame could not be handled by a fault of the service."))

    async def _read_large(self, frame: str | bytes) -> Frame:
        """One of all sockets at a time, and the loop has its turn between the steps."""
        async with self._runtime.large_frames:
            await asyncio.sleep(0)
            for found in read_in_steps(frame):
                if found is None:
                    await asyncio.sleep(0)
        return cast(Frame, found)

    async def _dispatch(self, message: ClientMessage, ignored: list[str]) -> None:
        match message:
            case Start():
                self._account.spend("turns")
                self._start(await self._checked(message), ignored)
            case ToolResult():
                self._account.spend("turns")
                self._start(message, ignored)
            case Cancel():
                self._account.spend("cancels")
                self._cancel(message)
            case SetPersona():
                await self._set_persona(message)
            case GetSession():
                session = self._runtime.sessions.find((self._account.name, message.session_id))
                self.send(self._runtime.describe(self._account.name, message.session_id, session))
            case Forget():
                if self.session is not None and self.session.session_id == message.session_id:
                    self.session = self._persona = None
                self._in_background(self._tell(self._runtime.forget(self._account.name, message.session_id)))
            case WarmPersona() | WarmHistory():
                self._account.spend("turns")
                self._warm(message)
            case Ping():
                self.send(Pong())
            case End():
                self._end(Ending(_CLOSE_NORMAL, "end"))

    async def _checked(self, message: Start) -> Start:
        """What is kept of the frame. Raises what it is refused for, before anything of it is kept."""
        blank = message.user_utterance is not None and not message.user_utterance.strip()
        if blank and not self._runtime.settings.allow_empty_utterance:
            raise BadMessage(
                "user_utterance is blank; null lets the assistant speak (ALLOW_EMPTY_UTTERANCE) - at $.user_utterance"
            )
        message = bounded(self._runtime, message)
        found = self._runtime.sessions.find((self._account.name, message.session_id))
        persona = (found.persona if found else Persona()).merge(message)
        if isinstance(message.tools, list) and self._runtime.tool_sets.known(message.tools) is None:
            self._account.spend("tools")
            await self._runtime.tool_sets.make(message.tools)
        if isinstance(message.persona_text, str):
            await self._runtime.check_persona(persona)
        return message

    def _start(self, message: Start | ToolResult, ignored: list[str]) -> None:
        key = (self._account.name, message.session_id)
        if isinstance(message, ToolResult) and self._runtime.sessions.find(key) is None:
            raise BadMessage(f"Turn {message.turn} waits for no tool results - at $.turn")
        session = self._runtime.sessions.open(key)
        turn = Turn(
            self._runtime,
            session,
            message,
            ignored=ignored,
            send=self.send,
            tokens=self._send_queue.open,
            after=self.turn,
        )
        self.session, self.turn, self._persona = session, turn, session.persona
        task = self._group.create_task(self.run_turn(turn))
        self._turns.add(task)
        task.add_done_callback(self._turns.discard)
        task.add_done_callback(lambda _: turn.abandon())

    async def run_turn(self, turn: Turn) -> None:
        """The task of a turn: to its end, and what comes of how it ended."""
        try:
            await turn.run()
        except WireError as error:
            self.end(error)
        else:
            session = turn.session
            if turn.warms_next and session.current is None and not self.is_ending:
                session.warming = self._in_background(self._warm_next(session))

    async def _warm_next(self, session: Session) -> None:
        with suppress(WireError):  # the next turn tells
            await warming.warm_next(self._runtime, session)

    def _cancel(self, message: Cancel) -> None:
        heard = Heard.of(message)
        if message.session_id is None and self.turn is not None and not self.turn.over:
            self.turn.cancel(heard)
            return
        session = self.session
        if message.session_id is not None:
            session = self._runtime.sessions.find((self._account.name, message.session_id))
        current = None if session is None else session.current
        if message.session_id is not None and current is not None and not current.over:
            current.cancel(heard)
            if current is not self.turn:  # its own done goes to the socket that it runs on
                self.send(Done(turn=current.number, session_id=current.session.session_id, cancelled=True))
            return
        if session is not None and heard is not None and (current is None or current.over):
            # The reply was sent whole, but playback was cut short.
            session.transcript.cut_reply(heard.chars, heard.text, self._runtime.settings.interrupted_mark)
            self._runtime.sessions.keep(session)
        session_id = UNSET if session is None else session.session_id
        self.send(Done(turn=0, session_id=session_id, cancelled=True, cancel_ms=0.0, tokens_sent=0))

    async def _set_persona(self, message: SetPersona) -> None:
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
        self.send(self._runtime.ack("set_persona", session, session.persona, session.turns, session.seed))

    def _warm(self, message: WarmPersona | WarmHistory) -> None:
        if len(self._warms) >= _MAX_WARMS:
            raise RateLimited(f"{len(self._warms)} warm-ups are running; limit is {_MAX_WARMS}", retry_after_ms=500)
        message = bounded(self._runtime, message)
        session = self.session
        if message.session_id is not None:
            session = self._runtime.sessions.find((self._account.name, message.session_id))
        task = self._group.create_task(self._run_warm(message, session))
        self._warms.add(task)
        task.add_done_callback(self._warms.discard)

    async def _run_warm(self, message: WarmPersona | WarmHistory, session: Session | None) -> None:
        try:
            async with self._one_warm:  # each may go by the persona of the one before
                warmed, self._persona = await warming.warm(
                    self._runtime, message, session, self._account.name, self._persona
                )
            self.send(warmed)
        except WireError as error:
            self.send(error_frame(error, session_id=UNSET if message.session_id is None else message.session_id))
        except Exception:
            _log.exception("warm.crashed")
            self.end(Internal("The warm-up failed by a fault of the service."))

    async def _tell(self, answer: Awaitable[ServerMessage]) -> None:
        self.send(await answer)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work that ends with the socket."""
        task = self._group.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)
        return task

    # --- out

    def send(self, message: ServerMessage) -> None:
        """Queues a frame. Never waits."""
        if isinstance(message, Error):
            self._runtime.metrics.errors.labels(message.error_code).inc()
        self._send_queue.put(message)

    async def _write(self) -> None:
        try:
            await self._send_queue.write(self._socket.send_text)
        except Exception as error:  # whatever the transport raises, the client is gone
            self._end(Ending(None, type(error).__name__))

    def _overflow(self) -> None:
        limit = self._runtime.settings.send_queue_bytes
        self.end(SlowClient(f"more than {limit} bytes wait to be read; limit is {limit}"))

    def _end(self, ending: Ending) -> None:
        if not self.is_ending:
            self._ending.set_result(ending)

    async def _close(self, ending: Ending, writer: asyncio.Task[None]) -> None:
        """Writes what still waits, then the close frame; a client that does not read gets neither wait."""
        slow = ending.error is not None and ending.error.error_code == SlowClient.code
        if ending.code is not None and not slow:
            if ending.error is not None:
                self.send(ending.error)
            self._send_queue.finish()
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
