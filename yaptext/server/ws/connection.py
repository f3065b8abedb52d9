"""One socket: a receive loop that never waits for a send, a generation or an engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import structlog
from starlette.websockets import WebSocket

from yaptext.dialogue.runtime import Runtime
from yaptext.errors import Internal, SlowClient, WireError
from yaptext.server.access.accounts import Account
from yaptext.server.conversation import Conversation
from yaptext.server.send_queue import WRITE_NOW, SendQueue, TokenStream
from yaptext.wire.frames import ClientMessage, Error, ServerMessage, encode, error_frame
from yaptext.wire.reading import Frame, read, read_in_steps

_log = structlog.get_logger(__name__)
_CLOSE_IDLE, _CLOSE_NORMAL = 4000, 1000
_FLUSH_TIMEOUT_S = 2.0
"""How long a closing socket may take to accept what still waits."""
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

    def __init__(
        self,
        websocket: WebSocket,
        runtime: Runtime,
        account: Account,
        *,
        at_rest: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        self._socket, self._runtime, self._account = websocket, runtime, account
        self.rests = partial(at_rest, self)
        settings = runtime.settings
        self._send_queue = SendQueue(
            max_bytes=settings.send_queue_bytes,
            flush_s=settings.stream_flush_ms / 1000,
            on_overflow=self._overflow,
            write_now=websocket.scope.get("extensions", {}).get(WRITE_NOW),
        )
        self.conversation = Conversation(runtime, account, self)
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    @property
    def busy(self) -> bool:
        """True while a turn is running or waits to run."""
        return self.conversation.busy

    @property
    def session_id(self) -> str | None:
        """Of its last turn."""
        turn = self.conversation.turn
        return None if turn is None else turn.session.session_id

    @property
    def is_ending(self) -> bool:
        """True from the first reason to end on."""
        return self._ending.done()

    def end(self, error: WireError) -> None:
        """Ends the connection with an error frame and its close code. The first reason counts."""
        self._end(Ending(error.close_code, error.code, error_frame(error)))

    def fail(self, error: WireError) -> None:
        """The turn that runs or waits ends with this error."""
        if self.conversation.turn is not None:
            self.conversation.turn.fail(error)

    def leave(self) -> None:
        """Ends the connection, since the client asked for it."""
        self._end(Ending(_CLOSE_NORMAL, "end"))

    async def serve(self) -> Ending:
        """Runs until the client leaves or `end` is called; then every turn is over and the socket closed."""
        async with asyncio.TaskGroup() as group:
            self.conversation.begin(group)
            receiver = group.create_task(self._receive())
            writer = group.create_task(self._write())
            ending = await self._ending
            receiver.cancel()
            await self.conversation.stop(gone=ending.code is None)
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
        """Acts on one frame. An error of it is answered with a frame."""
        message: ClientMessage | None = None
        try:
            self._account.spend("messages")
            message, ignored = await self._read_large(frame) if len(frame) > _LARGE_BYTES else read(frame)
            await self.conversation.handle(message, ignored)
        except WireError as error:
            self.send(error_frame(error, session_id=getattr(message, "session_id", None)))
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

    # --- out

    def send(self, message: ServerMessage) -> None:
        """Queues a frame. Never waits."""
        if isinstance(message, Error):
            self._runtime.metrics.errors.labels(message.error_code).inc()
        self._send_queue.put(message)

    def tokens(self, turn: int) -> TokenStream:
        return self._send_queue.open(turn)

    async def _write(self) -> None:
        try:
            await self._send_queue.write(self._send_frame)
        except Exception as error:  # whatever the transport raises, the client is gone
            self._end(Ending(None, type(error).__name__))

    async def _send_frame(self, frame: bytes) -> None:
        await self._socket.send_text(frame.decode())

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
