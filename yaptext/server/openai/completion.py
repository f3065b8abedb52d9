"""One request for a completion: its turn, from the slot to the last byte of the response."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.responses import Response

from yaptext.dialogue.outgoing import TokenSink
from yaptext.dialogue.request import TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.dialogue.turn import Turn
from yaptext.engine.base import whose
from yaptext.errors import SlowClient, WireError
from yaptext.server.openai import errors
from yaptext.server.openai.chunks import KEEP_ALIVE, Chunks
from yaptext.server.send_queue import LINK, SendQueue
from yaptext.wire.frames import Done, Error, IdentifiedCall, ServerMessage, ToolCall, error_frame

_KEEP_ALIVE_S = 5.0
"""LiveKit gives up on a stream that is silent for 10 s."""
_FLUSH_TIMEOUT_S = 30.0
"""How long a client may take to read the rest, once its turn is over."""
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class _Collected:
    """The tokens of a response that is one object."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.sent_tokens = 0

    def push(self, text: str, tokens: int) -> None:
        self.texts.append(text)
        self.sent_tokens += tokens

    def retract(self) -> str:
        return "".join(self.texts)


class Completion:
    """Holds a slot while its turn runs. A client that goes away ends the turn."""

    def __init__(self, scope: Any, receive: Any, send: Any, runtime: Runtime, key_name: str) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._runtime, self._key_name = runtime, key_name
        self._link = scope.get("extensions", {}).get(LINK)
        self.turn: Turn | None = None
        self._refusal: WireError | None = None
        self._error: Error | None = None
        self._calls: list[IdentifiedCall] = []
        self._done: Done | None = None
        self._started = self._gone = False

    @property
    def begun(self) -> bool:
        """Whether some of the response was sent."""
        return self._started

    @property
    def busy(self) -> bool:
        """True while the turn runs or waits."""
        return self.turn is None or not self.turn.finished.is_set()

    def fail(self, error: WireError) -> None:
        """The turn ends with this error."""
        self._refusal = self._refusal or error  # the turn may not have begun yet
        if self.turn is not None:
            self.turn.fail(error)

    end = fail  # a response ends with its turn

    def admit(self) -> None:
        """The request has its slot: the connection may take its time."""
        if self._link is not None:
            self._link.admit()

    async def run(self, session: Session, request: TurnRequest, chunks: Chunks, *, stream: bool) -> None:
        """Raises `WireError` before anything is sent."""
        if self._refusal is not None:
            raise self._refusal
        whose.set(self._key_name)
        self._chunks, self._collected = chunks, None if stream else _Collected()
        settings = self._runtime.settings
        self._queue = SendQueue(
            max_bytes=settings.send_queue_bytes,
            flush_s=settings.stream_flush_ms / 1000,
            on_overflow=self._overflow,
            write_now=self._link.write_now if self._link is not None else None,
            encode=chunks.of,
        )
        self.turn = Turn(self._runtime, session, request, self)
        self._turning = asyncio.create_task(self.turn.run())
        helpers = [asyncio.create_task(self._watch())]
        if stream:
            helpers += [asyncio.create_task(self._keep_alive()), asyncio.create_task(self._write())]
        try:
            await asyncio.wait([self._turning])
            if not self._turning.cancelled() and isinstance(error := self._turning.exception(), WireError):
                self.send(error_frame(error))
            if stream:
                self._queue.finish()
                _, unread = await asyncio.wait(helpers[2:], timeout=_FLUSH_TIMEOUT_S)
                if unread:
                    self._abort()
        finally:
            for task in (*helpers, self._turning):
                task.cancel()
            await asyncio.gather(*helpers, self._turning, return_exceptions=True)
            self.turn.abandon()
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await self._close()
        except TimeoutError:
            self._abort()

    # --- what the turn says

    def send(self, message: ServerMessage) -> None:
        if isinstance(message, Error):
            self._runtime.metrics.errors.labels(message.error_code).inc()
            self._error = message
            return
        if isinstance(message, ToolCall):
            self._calls = message.raw
        elif isinstance(message, Done):
            self._done = message
        if self._collected is None:
            self._queue.put(message)

    def tokens(self, turn: int) -> TokenSink:
        return self._queue.open(turn) if self._collected is None else self._collected

    # --- the response

    async def _write(self) -> None:
        await self._queue.write(self._part)

    async def _part(self, body: bytes) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
            body = self._chunks.first(calls=bool(self._calls)) + body
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _close(self) -> None:
        error = self._error
        if self._gone:
            return
        if not self._started and error is not None:
            await Response(
                msgspec.json.encode(errors.body_of(error)),
                errors.status_of(error),
                errors.headers_of(error),
                media_type="application/json",
            )(self._scope, self._receive, self._send)
            return
        if self._collected is not None:
            assert self._done is not None
            whole = self._chunks.whole("".join(self._collected.texts), self._calls, self._done)
            response = Response(msgspec.json.encode(whole), media_type="application/json")
            await response(self._scope, self._receive, self._send)
            return
        last = b"" if error is None else b"data: " + msgspec.json.encode(errors.body_of(error)) + b"\n\n"
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def _watch(self) -> None:
        """A disconnect ends the turn."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._turning.cancel()

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_ALIVE_S)
            self._queue.put_frame(KEEP_ALIVE)

    def _overflow(self) -> None:
        limit = self._runtime.settings.send_queue_bytes
        self.fail(SlowClient(f"more than {limit} bytes wait to be read; limit is {limit}"))
        self._abort()

    def _abort(self) -> None:
        self._gone = True
        if self._link is not None:
            self._link.abort()
