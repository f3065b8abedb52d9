"""One socket: a receive loop that never waits for a send, a generation or an engine."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import structlog
from starlette.websockets import WebSocket

from yaptext.dialogue.runtime import Runtime
from yaptext.errors import Internal, SlowClient, WireError
from yaptext.server.access.accounts import Account
from yaptext.server.send_queue import WRITE_NOW, SendQueue

_log = structlog.get_logger(__name__)
_CLOSE_NORMAL = 1000
_FLUSH_TIMEOUT_S = 2.0
"""How long a closing socket may take to accept what still waits."""
LARGE_BYTES = 32_768
"""Frames over this are read one in a round of the loop, of all sockets: each takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a connection ends. `code` is None if the client has gone already."""

    code: int | None
    reason: str
    error: WireError | None = None


class Socket(ABC):
    """One accepted socket from its first frame to its close. Tasks: receiver, writer, and those of its turns.

    A dialect says what a frame does, how an error is written, and which code closes the socket.
    """

    close_idle = 1001

    def __init__(self, websocket: WebSocket, runtime: Runtime, account: Account) -> None:
        self._socket, self._runtime, self._account = websocket, runtime, account
        self._send_queue = SendQueue(
            max_bytes=runtime.settings.send_queue_bytes,
            flush_s=runtime.settings.stream_flush_ms / 1000,
            on_overflow=self._overflow,
            write_now=websocket.scope.get("extensions", {}).get(WRITE_NOW),
        )
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    # --- what a dialect adds

    @property
    @abstractmethod
    def busy(self) -> bool:
        """True while a turn is running or waits to run."""

    @abstractmethod
    def fail(self, error: WireError) -> None:
        """The turn that runs or waits ends with this error."""

    @abstractmethod
    async def _act(self, frame: str | bytes) -> None:
        """Acts on one frame at once. An error of it is written by itself; what else is raised ends the socket."""

    @abstractmethod
    def _begin(self, group: asyncio.TaskGroup) -> None:
        """Before the first frame."""

    @abstractmethod
    async def _stop(self, *, gone: bool) -> None:
        """Returns when every turn is over; `gone` says that nobody reads their end."""

    @abstractmethod
    def _error(self, error: WireError) -> bytes:
        """The frame of an error that ends the socket."""

    def _say(self, error: WireError) -> None:
        """Queues that frame."""
        self._send_queue.put_frame(self._error(error))

    def _close_code(self, error: WireError) -> int:
        return error.close_code or Internal.close_code

    # --- the life of a socket

    @property
    def is_ending(self) -> bool:
        """True from the first reason to end on."""
        return self._ending.done()

    def end(self, error: WireError) -> None:
        """Ends the connection with an error frame and its close code. The first reason counts."""
        self._end(Ending(self._close_code(error), error.code, error))

    def leave(self) -> None:
        """Ends the connection, since the client asked for it."""
        self._end(Ending(_CLOSE_NORMAL, "end"))

    async def serve(self) -> Ending:
        """Runs until the client leaves or `end` is called; then every turn is over and the socket closed."""
        async with asyncio.TaskGroup() as group:
            self._begin(group)
            receiver = group.create_task(self._receive())
            writer = group.create_task(self._write())
            ending = await self._ending
            receiver.cancel()
            await self._stop(gone=ending.code is None)
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
                self._end(Ending(self.close_idle, "idle"))
                return
            if event["type"] == "websocket.disconnect":
                self._end(Ending(None, "disconnected"))
                return
            if self.is_ending:
                return
            frame = event.get("text")
            try:
                await self._act(event["bytes"] if frame is None else frame)
            except Exception:
                _log.exception("frame.crashed")
                self.end(Internal("The frame could not be handled by a fault of the service."))

    # --- out

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
        slow = isinstance(ending.error, SlowClient)
        if ending.error is not None:
            self._runtime.metrics.errors.labels(ending.error.code).inc()
        if ending.code is not None and not slow:
            if ending.error is not None:
                self._say(ending.error)
            self._send_queue.finish()
            await asyncio.wait([writer], timeout=_FLUSH_TIMEOUT_S)
        writer.cancel()
        if ending.code is None:
            return
        try:
            if slow and ending.error is not None:
                text = self._error(ending.error).decode()
                await self._socket.send({"type": "websocket.send", "text": text, "urgent": True})
            await self._socket.close(ending.code, ending.reason)
        except Exception as error:  # the client left meanwhile
            _log.debug("close.failed", error=type(error).__name__)
