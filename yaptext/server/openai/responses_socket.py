"""The socket of `/v1/responses`: one response after the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
import structlog
from msgspec import UNSET
from msgspec.structs import replace
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from yaptext.dialogue import warming
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.turn import Turn
from yaptext.engine.base import whose
from yaptext.errors import Internal, RateLimited, SlowClient, WireError
from yaptext.server.access.accounts import Account
from yaptext.server.access.caller import address, check_origin
from yaptext.server.openai import errors
from yaptext.server.openai.asked import asked_of_responses
from yaptext.server.openai.events import Events, as_frame
from yaptext.server.openai.reading import reader
from yaptext.server.openai.responses_schema import Cancel, Create
from yaptext.server.openai.said import HOLE, Numbering, Said
from yaptext.server.send_queue import WRITE_NOW
from yaptext.server.service import Service
from yaptext.server.slots import Slots
from yaptext.server.socket import LARGE_BYTES, Socket
from yaptext.wire.frames import Done, Error, Usage, error_frame

_log = structlog.get_logger(__name__)
_MOST_WAITING = 8
"""Responses of one socket."""
_OF_SOCKET_BYTES = 2**20
_CLOSE_SLOW = 1008
_ABORT_TIMEOUT_S = 10.0
_T = TypeVar("_T")
_decode: Callable[[str | bytes], Create | Cancel] = reader(Create, Cancel)


async def respond(websocket: WebSocket) -> None:
    """One socket, from its handshake to its close. A refusal is the HTTP answer to the handshake."""
    service: Service = websocket.state.service
    try:
        check_origin(websocket, service.settings)
        account = service.keys.identify(websocket)
        if service.lifecycle.phase == "draining":
            raise service.lifecycle.going_away()
        socket = ResponsesSocket(websocket, service.runtime, account, service.admission.slots)
        with service.admission.slot(account, socket):
            await websocket.accept()
            ending = await socket.serve()
        _log.info("connection.closed", key=account.name, code=ending.code, reason=ending.reason)
    except WireError as refusal:
        frame = error_frame(refusal)
        status, headers = errors.status_of(frame), errors.headers_of(frame)
        service.runtime.metrics.errors.labels(refusal.code).inc()
        service.refusals.tell("connection.refused", address(websocket), status=status, error_code=refusal.code)
        content = msgspec.json.encode(errors.body_of(frame))
        with suppress(WebSocketDisconnect):  # the client may have left
            await websocket.send_denial_response(Response(content, status, headers, media_type="application/json"))


class ResponsesSocket(Socket):
    """Answers requests one after the other. A cancel ends the response that runs."""

    def __init__(self, websocket: WebSocket, runtime: Runtime, account: Account, slots: Slots) -> None:
        super().__init__(websocket, runtime, account)
        self._slots = slots
        self._numbering = Numbering(websocket.scope.get("extensions", {}).get(WRITE_NOW))
        self._send_queue.write_now = self._numbering.write_now
        self._model = websocket.query_params.get("model")
        self._kept = runtime.kept.beside(_OF_SOCKET_BYTES)
        self._waiting: deque[tuple[Create, Events, int]] = deque()
        """With the bytes of their frames."""
        self._answering: asyncio.Task[None] | None = None
        self._turn: Turn | None = None
        self._warming: asyncio.Task[Usage] | None = None
        """Ends when anything else is wanted: it has the lowest priority."""
        self._response_id: str | None = None
        """Of the response that runs; its turn may not have begun."""
        self._before_id: str | None = None
        """Of the last response that was over when the client asked for the one that runs."""
        self._cancelled: set[str] = set()
        """Of the responses that run or wait."""

    @property
    def busy(self) -> bool:
        return self._answering is not None

    def fail(self, error: WireError) -> None:
        if self._turn is not None:
            self._turn.fail(error)

    # --- in

    def _begin(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        whose.set(self._account.name)

    async def _stop(self, *, gone: bool) -> None:
        self._waiting.clear()
        if self._turn is not None and not gone:
            self._turn.cancel()
        if self._answering is None:
            return
        if gone or self._turn is None:
            self._answering.cancel()
        _, stuck = await asyncio.wait([self._answering], timeout=_ABORT_TIMEOUT_S)
        for task in stuck:
            task.cancel()

    async def _act(self, frame: str | bytes) -> None:
        try:
            self._account.spend("messages")
            message = await self._read(frame)
            if isinstance(message, Cancel):
                self._account.spend("cancels")
                self._cancel(message.response_id)
            else:
                self._check_waiting(len(frame))
                message = replace(message, model=message.model or self._model)
                self._waiting.append((message, Events(message, as_frame), len(frame)))
                if self._warming is not None:
                    self._warming.cancel()
                if self._answering is None:
                    self._answering = self._group.create_task(self._answer())
        except WireError as error:
            self._send_error(error)

    def _check_waiting(self, more: int) -> None:
        """What waits takes many times its size in memory. Raises `RateLimited`."""
        if len(self._waiting) >= _MOST_WAITING:
            raise RateLimited(f"{_MOST_WAITING} responses wait on this socket; limit is {_MOST_WAITING}")
        size, limit = sum(size for *_, size in self._waiting), self._runtime.settings.max_frame_bytes
        if self._waiting and size + more > limit:
            raise RateLimited(f"responses of {size + more} bytes wait on this socket; limit is {limit}")

    async def _read(self, frame: str | bytes) -> Create | Cancel:
        if len(frame) <= LARGE_BYTES:
            return _decode(frame)
        async with self._runtime.large_frames:
            await asyncio.sleep(0)
            return _decode(frame)

    def _cancel(self, response_id: str | None) -> None:
        """The cancel of a response that is over changes nothing: the client may not know yet. If the client did know
        when it asked for the next response, it means that one, whose id it has not read: Pipecat does so."""
        known = [*filter(None, [self._response_id]), *(events.id for _, events, _ in self._waiting)]
        unnamed = response_id is None or response_id == self._before_id
        wanted = next(iter(known), None) if unnamed else response_id
        if wanted is not None and wanted in known:
            self._cancelled.add(wanted)
            runs = (self._turn or self._warming) if wanted == self._response_id else None
            if runs is not None:
                runs.cancel()

    # --- out

    async def _answer(self) -> None:
        try:
            while self._waiting and not self.is_ending:
                body, events, _ = self._waiting.popleft()
                self._response_id = events.id
                try:
                    await self._one(body, events)
                except WireError as error:
                    if error.close_code is not None:
                        self.end(error)
                    else:
                        self._send_error(error)
                finally:
                    self._cancelled.discard(events.id)
        except Exception:
            _log.exception("response.crashed")
            self.end(Internal("The request failed by a fault of the service."))
        finally:
            self._answering = self._turn = self._response_id = None
            self._slots.at_rest(self)

    async def _one(self, body: Create, events: Events) -> None:
        """One response. Raises the errors that refuse it before it begins, and those that end the socket."""
        self._account.spend("turns")
        asked = asked_of_responses(self._runtime, self._account, body, events, self._kept)
        async with asked.turn(self._runtime, self._account) as (session, request):

            def answered(said: Said) -> None:
                self._over(events.id)
                asked.answered(said)

            said = Said(events, self._send_queue, self._erred, answered)
            if body.generate is False:
                usage = await self._warm(warming.warm_request(self._runtime, session, request))
                said.begin()
                cancelled = True if events.id in self._cancelled else UNSET
                said.send(Done(turn=0, usage=usage, finish_reason="stop", cancelled=cancelled))
            else:
                self._turn = turn = Turn(self._runtime, session, request, said)
                said.alternatives = turn.answer.alternatives
                said.begin()
                if events.id in self._cancelled:
                    turn.cancel()
                try:
                    await _ended(asyncio.create_task(turn.run()))
                finally:
                    turn.abandon()
                    self._turn = None
                if said.error is not None:
                    for event in events.failed(said.error, said.text):
                        self._send_queue.put_frame(event)
                    self._over(events.id)

    def _over(self, response_id: str) -> None:
        """From here on the client may know that the response is over."""
        self._response_id = None
        self._before_id = None if self._waiting else response_id

    async def _warm(self, work: Coroutine[Any, Any, Usage]) -> Usage:
        self._warming = asyncio.create_task(work)
        if self._waiting or self._response_id in self._cancelled:
            self._warming.cancel()
        try:
            return await _ended(self._warming) or Usage()
        finally:
            self._warming = None

    async def _send_frame(self, frame: bytes) -> None:
        await super()._send_frame(self._numbering.of(frame))

    def _erred(self, error: Error) -> None:
        self._runtime.metrics.errors.labels(error.error_code).inc()

    def _send_error(self, error: WireError) -> None:
        frame = error_frame(error)
        self._erred(frame)
        self._send_queue.put_frame(_error_event(frame))

    def _error(self, error: WireError) -> bytes:
        return self._numbering.of(_error_event(error_frame(error)))

    def _say(self, error: WireError) -> None:
        """Nothing: a client that waits for no response would take the error for that of its next request."""

    def _close_code(self, error: WireError) -> int:
        """Clients reconnect after 1001, 1011, 1012, 1013."""
        return _CLOSE_SLOW if isinstance(error, SlowClient) else super()._close_code(error)


async def _ended(task: asyncio.Task[_T]) -> _T | None:
    """What the task returned; None if it was cancelled, as by the turn that it runs: the next response waits for this
    one. If the caller is cancelled, so is the task."""
    try:
        await asyncio.wait([task])
    finally:
        task.cancel()
        await asyncio.wait([task])  # the engine has let go
    return None if task.cancelled() else task.result()


def _error_event(error: Error) -> bytes:
    content: dict[str, Any] = {"status": errors.status_of(error)} | errors.body_of(error)
    if headers := errors.headers_of(error):
        content["error"]["headers"] = headers
    return b'{"type":"error",%b,%b' % (HOLE, msgspec.json.encode(content)[1:])
