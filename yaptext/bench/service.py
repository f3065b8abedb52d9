"""A conversation with Yap Text over its WebSocket, with as little work for each frame as possible.

It is the Sans-I/O half of websockets on an asyncio protocol: a frame is timed and noted in the callback that its
bytes arrive in, without waking a task (about 7 µs a frame, half of it JSON; a task for each would cost several times
that, and be measured along with the server).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import websockets
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from yaptext.bench.conversation import Conversation, Full
from yaptext.bench.http import Address, Getter
from yaptext.bench.plan import Sampling
from yaptext.bench.prompts import Story
from yaptext.bench.turn import Turn
from yaptext.client.errors import Refused

_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0
_WARM_TIMEOUT_S = 120.0
_ENGINE_STREAMS = re.compile(r"^yaptext_engine_streams(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Service:
    """Yap Text at a `ws://` address."""

    name = "yap-text"

    def __init__(self, url: str, key: str, sampling: Sampling) -> None:
        self.url, self._key, self._sampling = url, key, sampling
        self._getter = Getter(url, key)

    def conversation(self) -> Conversation:
        return ServiceConversation(self.url, self._key, self._sampling)

    async def idle_streams(self) -> float:
        status, text = await self._getter.get("/metrics")
        if status != 200:
            raise Refused(f"/metrics answers {status}")
        return sum(float(value) for value in _ENGINE_STREAMS.findall(text))

    def close(self) -> None:
        self._getter.close()


class ServiceConversation:
    def __init__(self, url: str, key: str, sampling: Sampling) -> None:
        self._url, self._key, self._sampling = url, key, sampling.service()
        self._wire: _Wire | None = None
        self._session, self._story = "", Story("", "")
        self._fresh = True
        self._turns: deque[Turn] = deque()
        """Turns that are not over, in the order of their `start`s, which is the order of their frames."""
        self._number: int | None = None
        """The number of the first of them, once its ack has come."""
        self.gone = asyncio.Event()
        self.closed_code: int | None = None
        self.strays = 0

    async def open(self) -> None:
        self.gone.clear()
        self.closed_code = None
        self._wire = _Wire(self._url, self._key, self._frame, self._lost)
        self._answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                await self._wire.connect()
                self._send("ping")
                await self._answer  # a refusal comes after the handshake, in the place of the pong
        except TimeoutError:
            self.drop()
            raise Refused(f"cannot connect to {self._url}: no answer in {_OPEN_TIMEOUT_S:.0f} s") from None
        except (OSError, websockets.InvalidHandshake, websockets.InvalidURI) as error:
            self.drop()
            raise Refused(f"cannot connect to {self._url}: {error}") from None
        except Refused:
            self.drop()
            raise

    def meet(self, session: str, story: Story) -> None:
        self._session, self._story, self._fresh = session, story, True

    async def warm(self) -> None:
        persona = {"persona_text": self._story.persona}
        for kind, fields in (("warm_persona", persona), ("warm_history", persona | self._history)):
            self._answer = asyncio.get_running_loop().create_future()
            if not self._send(kind, **fields):
                raise Refused("the service closed the connection")
            try:
                async with asyncio.timeout(_WARM_TIMEOUT_S):
                    await self._answer
            except TimeoutError:
                raise Refused(f"no answer to {kind} in {_WARM_TIMEOUT_S:.0f} s") from None

    @property
    def _history(self) -> dict[str, str]:
        return {"history_text": self._story.history}

    async def begin(self, utterance: str, *, part: str = "", again: bool = False) -> Turn:
        told: dict[str, Any] = {}
        if self._fresh or again:
            told |= self._history
        if self._fresh:
            told["persona_text"] = self._story.persona
        self._fresh = False
        turn = Turn(time.perf_counter(), part)
        for earlier in self._turns:
            if earlier.cancelled_at is None:
                earlier.cancelled_at, earlier.replaced = turn.sent_at, True
        self._turns.append(turn)
        if not self._send("start", session_id=self._session, user_utterance=utterance, sampling=self._sampling, **told):
            self._lose(turn.sent_at)
        return turn

    def cancel(self) -> None:
        if self._turns and self._turns[-1].cancelled_at is None:
            self._turns[-1].cancelled_at = time.perf_counter()
        self._send("cancel")

    def pause_reading(self) -> None:
        if self._wire is not None and self._wire.transport is not None:
            self._wire.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._wire is not None and self._wire.transport is not None:
            self._wire.transport.resume_reading()

    def drop(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort()
        self._lose(time.perf_counter())

    async def close(self) -> None:
        if self._send("end"):
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self.gone.wait()
            except TimeoutError:
                pass
        self.drop()

    def _send(self, type: str, **fields: Any) -> bool:
        """False where the socket is closed."""
        return self._wire is not None and self._wire.send(json.dumps({"type": type, **fields}))

    # --- what arrives

    def _frame(self, text: str, now: float) -> None:
        frame = json.loads(text)
        number = frame.get("turn")
        match frame["type"]:
            case "token":
                if self._is_current(number):
                    self._turns[0].token(frame["text"], now)
            case "ack":
                if self._number is None and self._turns:
                    self._number, self._turns[0].acked_at = number, now
                else:
                    self.strays += 1  # an ack before the done of the turn that it replaces
            case "toolcall":
                if self._is_current(number):
                    self._turns[0].decided_at = now
            case "final":
                if self._is_current(number) and frame["normalized_text"] != "".join(self._turns[0].text):
                    self.strays += 1
            case "done" if number:  # 0 answers a cancel that found nothing running
                if self._is_current(number):
                    self._end(frame, now)
            case "pong" | "warmed":
                if not self._answer.done():
                    self._answer.set_result(None)
            case "error":
                self._fail(frame, now)

    def _is_current(self, number: int | None) -> bool:
        if number == self._number:
            return True
        self.strays += 1
        return False

    def _end(self, frame: dict[str, Any], now: float) -> None:
        turn, self._number = self._turns.popleft(), None
        usage = frame["usage"]
        turn.prompt_tokens, turn.cached_tokens = usage["prompt_tokens"], usage["cached_tokens"]
        turn.completion_tokens = usage["completion_tokens"]
        turn.server_cancel_ms = frame.get("cancel_ms")
        turn.end("cancelled" if frame.get("cancelled") else "done", now)

    def _fail(self, frame: dict[str, Any], now: float) -> None:
        """An error belongs to the turn it names, else to the youngest that has no ack yet, else to a warm-up or to
        the opening."""
        code = str(frame["error_code"])
        if frame.get("turn") and frame["turn"] == self._number:
            self._number = None
            self._turns.popleft().end("failed", now, code)
        elif len(self._turns) > (self._number is not None):
            self._turns.pop().end("failed", now, code)
        elif not self._answer.done():
            self._answer.set_exception(Full(code, frame.get("retry_after_ms")))

    def _lost(self, code: int, now: float) -> None:
        self.closed_code = code
        self.gone.set()
        self._lose(now)
        if not self._answer.done():
            self._answer.set_exception(Refused(f"the service closed the connection: {code}"))

    def _lose(self, now: float) -> None:
        """No frame will come any more."""
        self._number = None
        while self._turns:
            self._turns.popleft().end("failed", now, f"closed_{self.closed_code or 1006}")


class _Wire(asyncio.Protocol):
    """One WebSocket: text out, text with its time of arrival in."""

    def __init__(
        self, url: str, key: str, on_text: Callable[[str, float], None], on_close: Callable[[int, float], None]
    ) -> None:
        self._url, self._key, self._on_text, self._on_close = url, key, on_text, on_close
        self.transport: asyncio.Transport | None = None

    async def connect(self) -> None:
        """Raises what websockets raises of a handshake, and `OSError`."""
        loop = asyncio.get_running_loop()
        self._protocol = ClientProtocol(parse_uri(self._url), max_size=None)
        self._opened: asyncio.Future[None] = loop.create_future()
        address = Address.parse(self._url)
        await loop.create_connection(lambda: self, address.host, address.port, ssl=address.tls)
        request = self._protocol.connect()
        request.headers["X-API-Key"] = self._key
        self._protocol.send_request(request)
        self._flush()
        await self._opened

    def send(self, text: str) -> bool:
        """False where the socket is closed."""
        if self._protocol.state is not State.OPEN:
            return False
        self._protocol.send_text(text.encode())
        self._flush()
        return True

    def abort(self) -> None:
        """Closes at once; nothing is called any more."""
        self._on_text = self._on_close = _ignore
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                if event.opcode is Opcode.TEXT:
                    self._on_text(str(event.data, "utf-8"), now)
            elif not self._opened.done():
                if self._protocol.handshake_exc is None:
                    self._opened.set_result(None)
                else:
                    self._opened.set_exception(self._protocol.handshake_exc)
        if self._protocol.writes:
            self._flush()

    def eof_received(self) -> None:
        self._protocol.receive_eof()
        self._flush()

    def connection_lost(self, _: Exception | None) -> None:
        if not self._opened.done():
            self._opened.set_exception(OSError("the connection was closed"))
            self._opened.exception()  # it may be that nobody waits any more
        received = self._protocol.close_rcvd
        self._on_close(received.code if received else 1006, time.perf_counter())

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data and self.transport is not None:
                self.transport.write(data)
            elif self.transport is not None and self.transport.can_write_eof():
                self.transport.write_eof()


def _ignore(*_: object) -> None:
    pass
