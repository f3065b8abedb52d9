"""The doors of the service behind one interface, for what has to hold on each of them."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
import websockets
from conftest import Running

from yaptext.engine.base import Engines

Talk = Sequence[tuple[str, str]]
"""Messages before the last one: (role, text)."""
_WIRE_CODES = {
    "invalid_api_key": "authentication_failed",
    "rate_limit_exceeded": "rate_limited",
    "context_length_exceeded": "text_too_long",
    "invalid_value": "bad_message",
    "invalid_prompt": "bad_message",
    "model_not_found": "not_deployed",
    "server_error": "engine_failed",
}
"""What `/ws` calls the errors of OpenAI's doors, if their names differ."""


@dataclass
class Outcome:
    """How a turn ended."""

    text: str = ""
    calls: list[str] = field(default_factory=list)
    whole_text: str | None = None
    """The reply as the last event has it."""
    cancelled: bool = False
    error: str | None = None
    """As `/ws` calls it."""
    message: str = ""
    status: int | None = None
    """Of HTTP, if the error was given with one."""
    retry_ms: int | None = None
    cached: int = 0
    prompt_tokens: int = 0
    closed: int | None = None
    """The code that the socket was closed with."""

    def fail(self, code: str, message: str, retry_ms: Any = None) -> None:
        self.error, self.message = _WIRE_CODES.get(code, code), message
        self.retry_ms = None if retry_ms is None else int(retry_ms)


class Exchange:
    """One turn of a client, while it runs and afterwards."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self.over = asyncio.Event()
        self.spoken = asyncio.Event()
        """Set when the first text has come."""
        self.fault: Exception | None = None

    async def end(self) -> Outcome:
        async with asyncio.timeout(60):
            await self.over.wait()
        if self.fault is not None:
            raise self.fault
        return self.outcome

    def say(self, text: str) -> None:
        self.outcome.text += text
        self.spoken.set()


class Visitor(ABC):
    """A client of one door, with one key."""

    streams: ClassVar[bool] = True
    """Whether text comes as it is made."""
    is_socket: ClassVar[bool] = False
    path: ClassVar[str]

    def __init__(self, running: Running, headers: dict[str, str], query: str = "") -> None:
        self.running, self.headers, self.query = running, headers, query
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Visitor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    @abstractmethod
    def request(self, text: str, system: str | None, talk: Talk, tools: Any, session: str) -> dict[str, Any]:
        """The body or frame of a turn."""

    @abstractmethod
    async def send(self, request: dict[str, Any] | bytes) -> Exchange:
        """Begins a turn with a request, or with what is to be taken for one."""

    async def begin(
        self, text: str = "hi", *, system: str | None = None, talk: Talk = (), tools: Any = None, session: str = "s"
    ) -> Exchange:
        return await self.send(self.request(text, system, talk, tools, session))

    async def ask(self, text: str = "hi", **fields: Any) -> Outcome:
        return await (await self.begin(text, **fields)).end()

    async def leave(self) -> None:
        """Disconnects, whatever runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _task(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


# --- HTTP


class _Http(Visitor):
    async def send(self, request: dict[str, Any] | bytes) -> Exchange:
        exchange = Exchange()
        content = request if isinstance(request, bytes) else json.dumps(request | {"stream": self.streams}).encode()
        self._task(self._exchange(exchange, content))
        return exchange

    async def _exchange(self, exchange: Exchange, content: bytes) -> None:
        outcome, url = exchange.outcome, f"{self.running.http}{self.path}{self.query}"
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
                async with client.stream("POST", url, content=content, headers=self.headers) as answer:
                    if answer.status_code != 200:
                        error = json.loads(await answer.aread())["error"]
                        outcome.fail(error["code"], error["message"], answer.headers.get("retry-after-ms"))
                        outcome.status = answer.status_code
                    elif self.streams:
                        async for line in answer.aiter_lines():
                            if line.startswith("data: {"):
                                self.take(exchange, json.loads(line[6:]))
                    else:
                        self.take_whole(outcome, json.loads(await answer.aread()))
        except Exception as fault:
            exchange.fault = fault
        finally:
            exchange.over.set()

    def take(self, exchange: Exchange, event: dict[str, Any]) -> None:
        raise NotImplementedError

    def take_whole(self, outcome: Outcome, found: dict[str, Any]) -> None:
        raise NotImplementedError


class ChatStream(_Http):
    path = "/v1/chat/completions"

    def request(self, text: str, system: str | None, talk: Talk, tools: Any, session: str) -> dict[str, Any]:
        before = [("system", system)] if system is not None else []
        messages = [{"role": role, "content": said} for role, said in [*before, *talk, ("user", text)]]
        body = {"model": "chat", "messages": messages, "metadata": {"session_id": session}}
        body |= {"stream_options": {"include_usage": True}} if self.streams else {}
        return body | ({} if tools is None else {"tools": tools})

    def take(self, exchange: Exchange, event: dict[str, Any]) -> None:
        outcome = exchange.outcome
        if "error" in event:
            outcome.fail(event["error"]["code"], event["error"]["message"])
        for choice in event.get("choices", ()):
            exchange.say(choice["delta"]["content"]) if choice["delta"].get("content") else None
            outcome.calls += [call["function"]["name"] for call in choice["delta"].get("tool_calls") or ()]
        _count(outcome, event.get("usage"), "prompt_tokens")

    def take_whole(self, outcome: Outcome, found: dict[str, Any]) -> None:
        message = found["choices"][0]["message"]
        outcome.text = outcome.whole_text = message["content"] or ""
        outcome.calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        _count(outcome, found["usage"], "prompt_tokens")


class ChatWhole(ChatStream):
    streams = False


class ResponsesStream(_Http):
    path = "/v1/responses"

    def request(self, text: str, system: str | None, talk: Talk, tools: Any, session: str) -> dict[str, Any]:
        return response_request(text, system, talk, tools, session)

    def take(self, exchange: Exchange, event: dict[str, Any]) -> None:
        take_event(exchange, event)

    def take_whole(self, outcome: Outcome, found: dict[str, Any]) -> None:
        take_response(outcome, found)
        outcome.text = outcome.whole_text or ""


class ResponsesWhole(ResponsesStream):
    streams = False


def response_request(text: str, system: str | None, talk: Talk, tools: Any, session: str) -> dict[str, Any]:
    given = [{"role": role, "content": said} for role, said in [*talk, ("user", text)]]
    body: dict[str, Any] = {"model": "chat", "input": given, "metadata": {"session_id": session}}
    if tools is not None:
        body["tools"] = [{"type": "function"} | tool.get("function", tool) for tool in tools]
    return body | ({} if system is None else {"instructions": system})


def take_event(exchange: Exchange, event: dict[str, Any]) -> None:
    if event["type"] == "response.output_text.delta":
        exchange.say(event["delta"])
    if event["type"] in ("response.completed", "response.incomplete", "response.failed"):
        take_response(exchange.outcome, event["response"])


def take_response(outcome: Outcome, response: dict[str, Any]) -> None:
    items = response["output"]
    outcome.whole_text = "".join(part["text"] for item in items for part in item.get("content", ()))
    outcome.calls = [item["name"] for item in items if item["type"] == "function_call"]
    outcome.cancelled = response["status"] == "cancelled"
    if response["error"] is not None:
        outcome.fail(response["error"]["code"], response["error"]["message"])
    _count(outcome, response["usage"], "input_tokens")


def _count(outcome: Outcome, usage: dict[str, Any] | None, prompt: str) -> None:
    if usage is not None:
        outcome.prompt_tokens = usage[prompt]
        outcome.cached = usage[f"{prompt}_details"]["cached_tokens"]


# --- sockets


class _Socket(Visitor):
    """Connects when it enters. If it is refused, each of its turns has that for its outcome."""

    is_socket = True

    def __init__(self, running: Running, headers: dict[str, str], query: str = "") -> None:
        super().__init__(running, headers, query)
        self.exchange: Exchange | None = None
        self.last = Outcome()
        """What was said outside of turns."""
        self.closed = asyncio.Event()

    async def __aenter__(self) -> Visitor:
        url = f"{self.running.http.replace('http', 'ws')}{self.path}{self.query}"
        headers = {name: value for name, value in self.headers.items() if name != "Origin"}
        try:
            self.socket = await websockets.connect(
                url,
                additional_headers=headers,
                origin=self.headers.get("Origin"),  # type: ignore[arg-type]
                proxy=None,
                max_size=None,
            )
        except websockets.InvalidStatus as refused:
            error = json.loads(refused.response.body or b"")["error"]
            self.last.fail(error["code"], error["message"], refused.response.headers.get("retry-after-ms"))
            self.last.status = refused.response.status_code
            self.closed.set()
        else:
            self._task(self._read())
        return self

    async def send(self, request: dict[str, Any] | bytes) -> Exchange:
        exchange = self.exchange = Exchange()
        if not self.closed.is_set():
            with suppress(websockets.ConnectionClosed):
                await self.socket.send(request.decode() if isinstance(request, bytes) else json.dumps(request))
        if self.closed.is_set():
            self._ended()
        return exchange

    async def leave(self) -> None:
        if hasattr(self, "socket"):
            await self.socket.close()
        await super().leave()

    async def until_closed(self) -> int | None:
        async with asyncio.timeout(60):
            await self.closed.wait()
        return self.last.closed

    async def _read(self) -> None:
        try:
            async for frame in self.socket:
                self.take(json.loads(frame))
        except websockets.ConnectionClosed:
            pass
        finally:
            self.last.closed = self.socket.close_code
            self.closed.set()
            self._ended()

    def _ended(self) -> None:
        if self.exchange is not None and not self.exchange.over.is_set():
            outcome = self.exchange.outcome
            outcome.error = outcome.error or self.last.error
            outcome.message = outcome.message or self.last.message
            outcome.status = outcome.status or self.last.status
            outcome.retry_ms, outcome.closed = outcome.retry_ms or self.last.retry_ms, self.last.closed
            self.exchange.over.set()

    @abstractmethod
    def take(self, event: dict[str, Any]) -> None: ...


class Ws(_Socket):
    path = "/ws"

    def request(self, text: str, system: str | None, talk: Talk, tools: Any, session: str) -> dict[str, Any]:
        history = [{"role": role, "content": said} for role, said in talk]
        frame: dict[str, Any] = {"type": "start", "session_id": session, "user_utterance": text, "history": history}
        if tools is not None:
            frame |= {"tools": tools, "await_tools": True}
        return frame | ({} if system is None else {"persona_text": system})

    def take(self, event: dict[str, Any]) -> None:
        exchange = self.exchange
        outcome = self.last if exchange is None or exchange.over.is_set() else exchange.outcome
        if event["type"] == "error":
            outcome.fail(event["error_code"], event["message"], event.get("retry_after_ms"))
        elif event["type"] == "toolcall":
            outcome.calls = [call["name"] for call in event["raw"] or ()]
        elif event["type"] == "final":
            outcome.whole_text = event["normalized_text"]
        elif event["type"] == "done":
            outcome.cancelled = event.get("cancelled", False)
            usage = event.get("usage", {})
            outcome.prompt_tokens, outcome.cached = usage.get("prompt_tokens", 0), usage.get("cached_tokens", 0)
        if exchange is not None and event["type"] == "token":
            exchange.say(event["text"])
        if exchange is not None and event["type"] in ("error", "done"):
            exchange.over.set()


class ResponsesSocket(_Socket):
    path = "/v1/responses"

    def request(self, text: str, system: str | None, talk: Talk, tools: Any, session: str) -> dict[str, Any]:
        return {"type": "response.create"} | response_request(text, system, talk, tools, session)

    def take(self, event: dict[str, Any]) -> None:
        exchange = self.exchange
        if event["type"] == "error":
            outcome = self.last if exchange is None or exchange.over.is_set() else exchange.outcome
            error = event["error"]
            outcome.fail(error["code"], error["message"], error.get("headers", {}).get("retry-after-ms"))
            outcome.status = event["status"]
        if exchange is None:
            return
        take_event(exchange, event)
        if event["type"] in ("error", "response.completed", "response.incomplete", "response.failed"):
            exchange.over.set()


DOORS: list[type[Visitor]] = [Ws, ChatStream, ChatWhole, ResponsesStream, ResponsesWhole, ResponsesSocket]
SOCKETS = [door for door in DOORS if door.is_socket]
HTTP = [door for door in DOORS if not door.is_socket]
STREAMS = [door for door in DOORS if door.streams]


class House:
    """A service, and visitors of one door of it."""

    def __init__(self, running: Running, door: type[Visitor], stack: AsyncExitStack) -> None:
        self.running, self.door, self._stack = running, door, stack
        self.service = running.server.lifespan.state["service"]

    async def visitor(self, key: str | None = "yap_token", *, query: str = "", **headers: str) -> Any:
        given = {} if key is None else {"Authorization": f"Bearer {key}"}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self._stack.enter_async_context(self.door(self.running, given | headers, query))

    async def ask(self, text: str = "hi", key: str | None = "yap_token", **fields: Any) -> Outcome:
        """A turn of a visitor of its own, that leaves afterwards."""
        async with self.door(self.running, {} if key is None else {"Authorization": f"Bearer {key}"}) as visitor:
            return await visitor.ask(text, **fields)


@asynccontextmanager
async def house(door: type[Visitor], engines: Engines, **variables: Any) -> AsyncIterator[House]:
    from conftest import service

    async with service(engines, **variables) as running, AsyncExitStack() as stack:
        yield House(running, door, stack)
