"""TCP connections that hold no slot: how many there may be, how long each may stay, and how much it may say."""

from __future__ import annotations

import asyncio
import os
import resource
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

_log = structlog.get_logger(__name__)
_MAX_REQUEST_BYTES = 65_536
"""Of one HTTP request, head and body: no endpoint takes a body, and llhttp bounds neither."""
_MAX_FRAGMENTS = 4096
"""Of one WebSocket message: the library bounds their bytes, not their number."""
_SLICE_BYTES = 16_384
_SPARE_FILES = 64
"""Descriptors for what is no socket of a client."""
_LEAST_PENDING = 8
"""One in so many connections may be without a slot, however few there may be: who comes has none yet."""
_TELL_EVERY_S = 10.0


class Lobby:
    """Connections without a slot: those that have not said who they are, plain HTTP, and those that were sent away
    and do not go. Each has `timeout_s`, anew with every HTTP response; over `limit` the oldest is cut off."""

    def __init__(self, limit: int, timeout_s: float) -> None:
        self.limit, self._timeout_s = limit, timeout_s
        self._waiting: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._cut, self._told_at = 0, -_TELL_EVERY_S

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, transport: asyncio.Transport) -> None:
        self.leave(transport)
        loop = asyncio.get_running_loop()
        # abort: a close would wait for ever for a client to read what is buffered.
        self._waiting[transport] = loop.call_later(self._timeout_s, transport.abort)
        if len(self._waiting) > self.limit:
            oldest = next(iter(self._waiting))
            self.leave(oldest)
            oldest.abort()
            self._tell(loop.time())

    def leave(self, transport: asyncio.Transport) -> None:
        timer = self._waiting.pop(transport, None)
        if timer is not None:
            timer.cancel()

    def _tell(self, now: float) -> None:
        self._cut += 1
        if now - self._told_at >= _TELL_EVERY_S:
            _log.warning("lobby.full", connections_cut=self._cut, limit=self.limit)
            self._cut, self._told_at = 0, now


def fitting(connections: int, pending: int) -> tuple[int, int]:
    """How many connections with a slot and how many without the descriptors of this process allow, at most as given.

    Raises the process's own limit where it may. At the limit accepting fails, for clients with a key as well: what is
    short is first taken from `pending`, down to a share, then from `connections`."""
    used = len(os.listdir("/proc/self/fd")) + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = used + connections + pending
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= wanted:
        return connections, pending
    room = max(2, soft - used)
    slots = min(connections, room - min(pending, max(1, room // _LEAST_PENDING)))
    hint = f"at most {soft} files are allowed, {wanted} are needed for {connections} connections and {pending} pending"
    _log.warning("files.short", max_connections=slots, max_pending_handshakes=room - slots, hint=hint)
    return slots, room - slots


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, with bounds on time and size. Its connections are in the lobby from their first byte."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.lobby: Lobby = self.app_state["service"].lobby
        self._request_bytes = 0
        self.lobby.enter(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lobby.leave(self.transport)

    def data_received(self, data: bytes) -> None:
        self._request_bytes += len(data)
        if self._request_bytes > _MAX_REQUEST_BYTES:
            self.send_400_response(f"The request is over {_MAX_REQUEST_BYTES} bytes.")
        else:
            super().data_received(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._request_bytes = 0
        if not self.transport.is_closing():
            self.lobby.enter(self.transport)

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        protocol = self.transport.get_protocol()
        if isinstance(protocol, WebSocketProtocol) and not protocol.handshake_initiated:
            # What the library answers to a head over its own limits, and uvicorn forgets to send.
            self.transport.write(b"".join(protocol.conn.data_to_send()))
            self.transport.close()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSockets, with bounds where a client could fill the memory. A socket leaves the lobby when the
    app listens to it, and is back there when the app is done with it."""

    _unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.lobby: Lobby = self.app_state["service"].lobby

    def data_received(self, data: bytes) -> None:
        """Takes a burst slice by slice: in 256 KB there are 40,000 pings, and everyone else would wait for them."""
        first, self._unread = not self._unread, self._unread + data
        if first:
            self._take()

    def _take(self) -> None:
        if self.transport.is_closing():
            return
        data, self._unread = self._unread[:_SLICE_BYTES], self._unread[_SLICE_BYTES:]
        super().data_received(data)
        if self._unread and not self.transport.is_closing():
            self.read_paused = True
            self.transport.pause_reading()
            self.loop.call_soon(self._take)
        else:
            self._read_on()

    def _read_on(self) -> None:
        if self.read_paused and self.queue.empty() and not self._unread and not self.transport.is_closing():
            self.read_paused = False
            self.transport.resume_reading()

    async def receive(self) -> Any:
        if self.handshake_complete:
            self.lobby.leave(self.transport)
        message = await self.queue.get()
        self._read_on()
        return message

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        if not self.disconnected:
            self.lobby.enter(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lobby.leave(self.transport)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        # Its close waits for a client that has gone to read what is buffered; the slot does not.
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # a client that does not read gets no pongs, which nothing would bound

    def handle_text(self, event: Frame) -> None:
        """JSON is decoded from bytes, and what is no UTF-8 is a `bad_message` like other damage."""
        self.handle_bytes(event)

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) < _MAX_FRAGMENTS:
            super().handle_cont(event)
        elif not self.close_sent:
            self.conn.fail(1009, f"over {_MAX_FRAGMENTS} fragments")
            self.handle_parser_exception()
