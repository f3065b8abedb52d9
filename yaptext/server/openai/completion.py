"""One request for a completion: its turn, from the slot to the last byte of the response."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.responses import Response

from yaptext.dialogue.request import TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.dialogue.turn import Turn
from yaptext.engine.base import whose
from yaptext.errors import SlowClient, WireError
from yaptext.server.openai import errors
from yaptext.server.openai.asked import Asked
from yaptext.server.openai.said import Numbering, Said
from yaptext.server.send_queue import LINK, SendQueue
from yaptext.wire.frames import Error, error_frame

_KEEP_ALIVE, _KEEP_ALIVE_S = b": ping\n\n", 5.0
"""LiveKit gives up on a stream that is silent for 10 s."""
_FLUSH_TIMEOUT_S = 30.0
"""Time for a client to read the rest, after its turn."""
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Completion:
    """Holds a slot while its turn runs. If the client disconnects, the turn ends."""

    def __init__(self, scope: Any, receive: Any, send: Any, runtime: Runtime, key_name: str) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._runtime, self._key_name = runtime, key_name
        self._link = scope.get("extensions", {}).get(LINK)
        self.turn: Turn | None = None
        self._refusal: WireError | None = None
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

    async def run(self, session: Session, request: TurnRequest, asked: Asked) -> None:
        """Raises `WireError` before anything is sent."""
        if self._refusal is not None:
            raise self._refusal
        whose.set(self._key_name)
        settings = self._runtime.settings
        write_now = self._link.write_now if self._link is not None else None
        self._numbering = Numbering(write_now)
        self._queue = SendQueue(
            max_bytes=settings.send_queue_bytes,
            flush_s=settings.stream_flush_ms / 1000,
            on_overflow=self._overflow,
            write_now=self._numbering.write_now if asked.dialect.numbered else write_now,
        )
        stream = asked.stream
        self._said = said = Said(asked.dialect, self._queue if stream else None, self._erred, asked.answered)
        self.turn = Turn(self._runtime, session, request, said)
        said.alternatives = self.turn.answer.alternatives
        self._turning = asyncio.create_task(self.turn.run())
        helpers = [asyncio.create_task(self._watch())]
        if stream:
            helpers += [asyncio.create_task(self._keep_alive()), asyncio.create_task(self._write())]
        try:
            await asyncio.wait([self._turning])
            if not self._turning.cancelled() and isinstance(error := self._turning.exception(), WireError):
                said.send(error_frame(error))
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
                await self._close(said)
        except TimeoutError:
            self._abort()

    # --- the response

    async def _write(self) -> None:
        await self._queue.write(self._part)

    async def _part(self, event: bytes) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
            for first in self._said.dialect.begin():
                await self._body(self._numbering.of(first))
        await self._body(self._numbering.of(event))

    async def _body(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _close(self, said: Said) -> None:
        error, dialect = said.error, said.dialect
        if self._gone:
            return
        if self._started:
            for event in () if error is None else dialect.failed(error, said.text):
                await self._part(event)
            await self._body(b"", more=False)
            return
        if error is not None:
            content, status, headers = errors.body_of(error), errors.status_of(error), errors.headers_of(error)
        else:
            content, status, headers = said.whole(), 200, {}
        response = Response(msgspec.json.encode(content), status, headers, media_type="application/json")
        await response(self._scope, self._receive, self._send)

    def _erred(self, error: Error) -> None:
        self._runtime.metrics.errors.labels(error.error_code).inc()

    async def _watch(self) -> None:
        """A disconnect ends the turn."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._turning.cancel()

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_ALIVE_S)
            self._queue.put_frame(_KEEP_ALIVE)

    def _overflow(self) -> None:
        limit = self._runtime.settings.send_queue_bytes
        self.fail(SlowClient(f"more than {limit} bytes wait to be read; limit is {limit}"))
        self._abort()

    def _abort(self) -> None:
        self._gone = True
        if self._link is not None:
            self._link.abort()
