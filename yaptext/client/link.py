"""The socket under a conversation: opened, read, and replaced when it breaks."""

from __future__ import annotations

import asyncio
import inspect
import random
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import msgspec
import websockets

from yaptext.client.errors import (
    RECONNECTS,
    RECONNECTS_WHEN_NEEDED,
    ConnectionLost,
    Refused,
    TicketFailed,
    Unreadable,
    YapTextError,
    error_of,
)
from yaptext.client.events import event_of
from yaptext.client.tools import result_of
from yaptext.wire.frames import Error, Pong, ServerMessage

_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LEAST_WAIT_S = 0.25, 8.0, 0.1
_BUSY = frozenset({429, 502, 503, 504})
_PING, _END = '{"type":"ping"}', '{"type":"end"}'
_NO_HEADER = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")

Ticket = Callable[[], str | Awaitable[str]]
"""Brings a new ticket of the service (`POST /ticket`) for each connection."""


def _in_utf8(key: str) -> str:
    """A header value that arrives in UTF-8. websockets writes headers in Latin-1 from 17 on, in UTF-8 before."""
    if _NO_HEADER.search(key):
        raise Refused("the key holds a line break or another character that no header may have")
    latin = key.encode().decode("latin-1")
    return latin if key.encode() in websockets.Headers(key=latin).serialize() else key


class Link:
    """One socket at a time. `on_event` gets each event; `on_lost` is called when the socket is gone, with the
    reason."""

    def __init__(
        self,
        url: str,
        key: str | None,
        ticket: Ticket | None,
        *,
        reconnect: bool,
        give_up_s: float,
        options: dict[str, Any],
        on_event: Callable[[ServerMessage], None],
        on_lost: Callable[[YapTextError], None],
    ) -> None:
        if (key is None) == (ticket is None):
            raise TypeError("connect() needs either key or ticket")
        self._url, self._ticket, self._reconnect, self._give_up_s = url, ticket, reconnect, give_up_s
        self._shown = url.partition("?")[0]
        headers = dict(options.get("additional_headers") or {})
        if key is not None:
            headers["X-API-Key"] = _in_utf8(key)
        self._options: dict[str, Any] = {"open_timeout": _OPEN_TIMEOUT_S, "max_size": None}
        if "proxy" in inspect.signature(websockets.connect).parameters:  # from 15 on
            self._options["proxy"] = None
        self._options |= {**options, "additional_headers": headers, "close_timeout": _CLOSE_TIMEOUT_S}
        self._on_event, self._on_lost = on_event, on_lost
        self.socket: websockets.ClientConnection | None = None
        self._failure: YapTextError | None = None
        """Why there will be no further socket."""
        self._given_up: YapTextError | None = None
        """Why the client itself ended the socket."""
        self._wanted = asyncio.Event()
        self._next: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the next socket is open, or when the client gives up for now."""

    async def open(self) -> None:
        """The first connection. It is not tried again: the caller decides."""
        self._take(await self._connect())
        self._task = asyncio.create_task(self._keep())

    async def ready(self) -> websockets.ClientConnection:
        """Waits for a socket. Raises why there is none."""
        while self.socket is None:
            if self._failure is not None:
                raise self._failure
            self._wanted.set()
            await asyncio.shield(self._next)
        return self.socket

    def give_up(self, reason: YapTextError) -> None:
        """Ends a socket that is of no use any more: what waits for it fails, and another one is opened."""
        if self.socket is not None:
            self._given_up = reason
            self.socket.transport.abort()

    async def close(self) -> None:
        self._failure = closed = Refused("the client is closed")
        self._reconnect = False
        socket = self.socket
        if socket is not None:
            with suppress(websockets.ConnectionClosed, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await socket.send(_END)
            await socket.close()
        self._task.cancel()
        await asyncio.wait([self._task])
        self._lose(closed)

    # --- one socket

    async def _address(self) -> str:
        if self._ticket is None:
            return self._url
        try:
            async with asyncio.timeout(self._options["open_timeout"]):
                ticket = quote(await result_of(self._ticket), safe="")
        except YapTextError:
            raise
        except Exception as error:
            raise TicketFailed(f"no ticket: {str(error) or type(error).__name__}") from error
        return f"{self._url}{'&' if '?' in self._url else '?'}ticket={ticket}"

    async def _connect(self) -> websockets.ClientConnection:
        """A socket that has been accepted: the service refuses one after the handshake, with a frame."""
        address = await self._address()
        try:
            socket = await websockets.connect(address, **self._options)
        except websockets.InvalidStatus as error:
            raise self._refusal(error) from None
        except websockets.InvalidURI as error:  # its text has the query, which may hold a secret
            raise Refused(f"cannot connect to {self._shown}: {error.msg}") from None
        except (OSError, ValueError, websockets.InvalidHandshake) as error:  # ValueError: of a name or a port
            passes = isinstance(error, OSError | websockets.InvalidMessage)
            raise Refused(f"cannot connect to {self._shown}: {error}", retryable=passes) from None
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                with suppress(websockets.ConnectionClosed):  # the reason is still to be read
                    await socket.send(_PING)
                while not isinstance(event := event_of(await socket.recv()), Pong):
                    if isinstance(event, Error):
                        raise error_of(event)
        except BaseException as error:
            await socket.close()
            if isinstance(error, websockets.ConnectionClosed):
                raise ConnectionLost(socket.protocol.close_code or 1006, socket.protocol.close_reason or "") from None
            if isinstance(error, TimeoutError):
                reason = f"cannot connect to {self._shown}: no answer in {_OPEN_TIMEOUT_S:.0f} s"
                raise Refused(reason, retryable=True) from None
            raise
        return socket

    def _refusal(self, error: websockets.InvalidStatus) -> YapTextError:
        """Of a handshake that was answered with a status: a service that starts, a proxy, or something else."""
        response = error.response
        try:
            return error_of(msgspec.convert({"type": "error", **msgspec.json.decode(response.body or b"")}, Error))
        except (msgspec.MsgspecError, TypeError):
            after = response.headers.get("Retry-After", "")
            return Refused(
                f"cannot connect to {self._shown}: {error}",
                retryable=response.status_code in _BUSY,
                retry_after_ms=int(after) * 1000 if after.isdecimal() else None,
            )

    async def _read(self, socket: websockets.ClientConnection) -> tuple[YapTextError, int]:
        """Reads until the socket is gone; returns why, and the close code. An error that belongs to no turn is the
        reason if it comes last."""
        last: ServerMessage | None = None
        try:
            async for data in socket:
                event = event_of(data)
                if event is not None:
                    last = event
                    self._on_event(event)
        except websockets.ConnectionClosed:
            pass
        except Unreadable as error:
            await socket.close()
            return error, 0
        code = socket.protocol.close_code or 1006
        if (given_up := self._given_up) is not None:
            self._given_up = None
            return given_up, 1006
        if isinstance(last, Error) and not last.turn:
            return error_of(last), code
        return ConnectionLost(code, socket.protocol.close_reason or ""), code

    # --- one after the other

    async def _keep(self) -> None:
        try:
            await self._keep_open()
        except Exception as error:  # a fault of the client: calls must not wait for ever
            self._failure = Refused(f"the client failed: {error!r}")
            self._lose(self._failure)
            raise

    async def _keep_open(self) -> None:
        while self.socket is not None:
            reason, code = await self._read(self.socket)
            if self._failure is not None:  # it was closed
                reason = self._failure
            elif not self._reconnect or code not in RECONNECTS | RECONNECTS_WHEN_NEEDED:
                self._failure = reason
            self._lose(reason)
            if self._failure is not None:
                return
            if code in RECONNECTS_WHEN_NEEDED:
                await self._wanted.wait()
            self._take(await self._connect_again(reason, at_once=code in RECONNECTS_WHEN_NEEDED))

    async def _connect_again(self, reason: YapTextError, *, at_once: bool) -> websockets.ClientConnection | None:
        """Tries until a socket is open. After `give_up_s` the calls that wait fail, and it goes on with the next call.
        Returns None if no try can help."""
        loop = asyncio.get_running_loop()
        gives_up_at, tries = loop.time() + self._give_up_s, 0
        while True:
            if not at_once:
                wait_s = min(_FIRST_WAIT_S * 2**tries, _LONGEST_WAIT_S) * random.uniform(0.5, 1)
                if reason.retry_after_ms is not None:
                    wait_s = max(reason.retry_after_ms / 1000, _LEAST_WAIT_S)
                if loop.time() + wait_s > gives_up_at:
                    self._wanted.clear()
                    self._fail_waiting(reason)
                    await self._wanted.wait()
                    gives_up_at, tries, wait_s = loop.time() + self._give_up_s, 0, 0
                await asyncio.sleep(wait_s)
            at_once = False
            try:
                return await self._connect()
            except YapTextError as error:
                reason = error
                if not error.retryable:
                    self._failure = error
                    self._fail_waiting(error)
                    return None
            tries += 1

    def _take(self, socket: websockets.ClientConnection | None) -> None:
        self.socket = socket
        if socket is not None and not self._next.done():
            self._next.set_result(None)

    def _lose(self, reason: YapTextError) -> None:
        self.socket = None
        self._wanted.clear()
        if self._next.done():
            self._next = asyncio.get_running_loop().create_future()
        if self._failure is not None or not self._reconnect:
            self._failure = self._failure or reason
            self._fail_waiting(self._failure)
        self._on_lost(reason)

    def _fail_waiting(self, reason: YapTextError) -> None:
        if not self._next.done():
            self._next.set_exception(reason)
            self._next.exception()  # it may be that nobody waits
        self._next = asyncio.get_running_loop().create_future()
