"""uvicorn's protocols, with bounds on what a client may send."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.protocol import State

from yaptext.server.access.sparing import Sparing
from yaptext.server.pending import PendingConnections
from yaptext.server.send_queue import LINK, WRITE_NOW

_MAX_REQUEST_BYTES = 65_536
"""Of one HTTP request, which llhttp does not bound. Below `/v1/` a body may have what a frame of `/ws` may."""
_WITH_BODY = b"/v1/"
_MAX_URL_BYTES, _MAX_HEADERS = 8192, 128
"""Of one HTTP request, as the WebSocket library has it for a handshake."""
_MAX_HOP_BYTES = 1024
"""Of `Connection` and `Upgrade`, which are taken apart word by word."""
_MAX_PIECES = 128
"""Of one HTTP body, as it arrives or in chunks."""
_NEVER_TAKEN_UP = (b"sec-websocket-extensions", b"sec-websocket-protocol")
_MAX_PIPELINED = 16
"""Requests of one connection that wait for an earlier one's response: clients send one at a time."""
_MAX_FRAGMENTS = 4096
"""Of one WebSocket message: the library bounds their bytes, not their number."""
_SLICE_BYTES = 16_384


class _Refused(Exception):
    """A request that is answered before the app sees it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class HttpLink:
    """What the app may do with the connection of one request beside ASGI."""

    def __init__(self, protocol: HttpProtocol, cycle: Any) -> None:
        self._protocol, self._cycle = protocol, cycle

    def admit(self) -> None:
        """The request has a slot: its connection is no longer pending."""
        self._protocol.pending.leave(self._protocol.transport)

    def write_now(self, part: bytes) -> bool:
        """Writes a part of a body. False, and nothing is written, if the client cannot take one."""
        cycle, transport = self._cycle, self._protocol.transport
        begun = cycle.response_started and cycle.chunked_encoding and not cycle.response_complete
        if not begun or cycle.disconnected or self._protocol.flow.write_paused or transport.is_closing():
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True

    def abort(self) -> None:
        self._protocol.transport.abort()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, with bounds on time and size. Its connections are pending from their first byte."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.pending: PendingConnections = self.app_state["service"].pending
        self._request_bytes, self._max_bytes = 0, _MAX_REQUEST_BYTES
        self._most_bytes = _MAX_REQUEST_BYTES + self.app_state["service"].settings.max_frame_bytes
        self._lost, self._alone = False, cast(Any, None)
        self.pending.enter(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        super().connection_lost(exc)
        self.pending.leave(self.transport)

    def data_received(self, data: bytes) -> None:
        """uvicorn's, whose warnings anybody could fill the log with."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._request_bytes += len(data)
        try:
            self._check_size(self._most_bytes)
            self.parser.feed_data(data)
            self._check_size(self._max_bytes)  # of a header that has no end
        except HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
        except _Refused as refusal:
            self._refuse(refusal)
        except HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, _Refused) else _Refused(400, "Invalid HTTP request received."))

    def _refuse(self, refusal: _Refused) -> None:
        refusals: Sparing = self.app_state["service"].refusals
        peer = self.transport.get_extra_info("peername")
        refusals.tell("request.refused", peer[0] if peer else "", status=refusal.status)
        head = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        text = refusal.message.encode()
        self.transport.write(STATUS_LINE[refusal.status] + head % len(text) + text)
        self.transport.close()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise _Refused(400, f"Over {_MAX_PIPELINED} requests wait on this connection.")
        self._hop_bytes = self._pieces = 0
        super().on_message_begin()

    def _check_size(self, limit: int) -> None:
        if self._request_bytes > limit:
            raise _Refused(400, f"The request is over {limit} bytes.")

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._max_bytes = self._most_bytes if self.url.startswith(_WITH_BODY) else _MAX_REQUEST_BYTES
        # uvicorn tells only the latest request of a connection that it is lost, and these have to know.
        running = self.cycle if self.url.startswith(_WITH_BODY) else self._alone
        if running is not None and not running.response_complete:
            raise _Refused(400, "Requests beside one below /v1/ need connections of their own.")
        if len(self.url) > _MAX_URL_BYTES:
            raise _Refused(414, f"The address is over {_MAX_URL_BYTES} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._check_size(self._max_bytes)
        if len(self.headers) >= _MAX_HEADERS:
            raise _Refused(431, f"The request has over {_MAX_HEADERS} headers.")
        if name.lower() in (b"connection", b"upgrade"):
            self._hop_bytes += len(value)
            if self._hop_bytes > _MAX_HOP_BYTES:
                raise _Refused(431, f"Connection and Upgrade are over {_MAX_HOP_BYTES} bytes.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.scope["extensions"] = {LINK: HttpLink(self, self.cycle)}  # type: ignore[dict-item]
        self._alone = self.cycle if self.url.startswith(_WITH_BODY) else None

    def on_body(self, body: bytes) -> None:
        self._check_size(self._max_bytes)
        self._pieces += 1
        most = _MAX_PIECES * self._max_bytes // _MAX_REQUEST_BYTES
        if self._pieces > most:
            raise _Refused(400, f"The body is in over {most} pieces.")
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._request_bytes = 0
        if not self._lost:
            self.pending.enter(self.transport, answered=True)

    def handle_websocket_upgrade(self) -> None:
        # Never taken up here; the library needs milliseconds to read a long one.
        self.scope["headers"] = [header for header in self.headers if header[0] not in _NEVER_TAKEN_UP]
        super().handle_websocket_upgrade()
        protocol = self.transport.get_protocol()
        if isinstance(protocol, WebSocketProtocol) and not protocol.handshake_initiated:
            # What the library answers to a head over its own limits, and uvicorn forgets to send. To what is no
            # handshake for it, such as one with a body, it answers nothing.
            answer = b"".join(protocol.conn.data_to_send())
            if answer:
                self.transport.write(answer)
                self.transport.close()
            else:
                self._refuse(_Refused(400, "Invalid WebSocket handshake."))


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSockets, with bounds where a client could fill the memory. A socket is no longer pending when the
    app listens to it, and is pending again when the app is done with it.

    The library reads all that comes in, and writes all that goes out but whole text frames: those are written by the
    task that has them, with none in between (`send_queue.WRITE_NOW`). A close does not wait for a client that does not
    read.
    """

    # Why not the library's `ServerProtocol.send_text` for them: a token costs 24.3 us of CPU with it (spread; 23.1 if
    # all get theirs in one step) instead of 22.3 (21.4): 9 (8) % more; with `Frame.serialize` alone 7 (10) %. They are
    # medians of four alternating rounds of tests/bench/front_end.py, 1,000 sockets, the scripted engine included.

    _unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.pending: PendingConnections = self.app_state["service"].pending

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pending.leave(self.transport)

    async def run_asgi(self) -> None:
        self.scope["extensions"][WRITE_NOW] = self.write_text  # type: ignore[assignment]
        await super().run_asgi()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        if not self.disconnected:
            self.pending.enter(self.transport, answered=True)

    # --- in

    def data_received(self, data: bytes) -> None:
        """Takes a burst slice by slice: in 256 KB there are 40,000 pings, and everyone else would wait for them."""
        first, self._unread = not self._unread, self._unread + data
        if first:
            self._take()

    def _take(self) -> None:
        if self.transport.is_closing():
            return
        # A handshake is one slice: it is bounded, and who passes it on wants to know at once what became of it.
        size = _SLICE_BYTES if self.handshake_initiated else len(self._unread)
        data, self._unread = self._unread[:size], self._unread[size:]
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
            self.pending.leave(self.transport)
        message = await self.queue.get()
        self._read_on()
        return message

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        # Its close waits for a client that has gone to read what is buffered; the slot does not.
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # a client that does not read gets no pongs, which nothing would bound

    def send_receive_event_to_app(self) -> None:
        """Text stays bytes, from which JSON is decoded, and what is no UTF-8 ends the connection (RFC 6455, 8.1)."""
        if self.curr_msg_data_type == "text":
            data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
            try:
                data.decode()
            except UnicodeDecodeError:
                if not self.close_sent:
                    self.conn.fail(1007, "text that is not UTF-8")
                    self.handle_parser_exception()
                return
            self.frames, self.curr_msg_data_type = [data], "bytes"
        super().send_receive_event_to_app()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) < _MAX_FRAGMENTS:
            super().handle_cont(event)
        elif not self.close_sent:
            self.conn.fail(1009, f"over {_MAX_FRAGMENTS} fragments")
            self.handle_parser_exception()

    # --- out

    def write_text(self, payload: bytes) -> bool:
        """Writes one text frame (UTF-8). False, and nothing is written, where the socket cannot take one now."""
        if not self._may_write():
            return False
        self.transport.write(text_header(len(payload)) + payload)
        return True

    async def send(self, message: Any) -> None:
        if message.get("text") is not None and self.write_text(message["text"].encode()):
            return
        if message["type"] == "websocket.close" or message.pop("urgent", False):
            self.writable.set()
        await super().send(message)

    def _may_write(self) -> bool:
        """True between the handshake and the first sign of an end, while the client keeps up."""
        over = self.disconnected or self.close_sent or self.transport.is_closing()
        return self.handshake_complete and self.conn.state is State.OPEN and self.writable.is_set() and not over


def text_header(length: int) -> bytes:
    """Of a server's whole text frame: final, unmasked (RFC 6455, section 5.2)."""
    if length < 126:
        return bytes((0x81, length))
    return struct.pack("!BBH", 0x81, 126, length) if length < 65_536 else struct.pack("!BBQ", 0x81, 127, length)
