"""A conversation with any server of OpenAI's chat completions, streamed as server-sent events.

The persona and the history that Yap Text gets as fields go into the system message, as Yap Text itself lays them out,
or `in_roles`: the persona is the system message, and each message of the history is one. The utterance is a user
message, and what was said since follows as messages. Barging in is closing the connection: there is no other way to.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, cast

from yaptext.bench.conversation import Conversation
from yaptext.bench.http import Address, Getter, Malformed, Response, request
from yaptext.bench.plan import Sampling
from yaptext.bench.prompts import Story
from yaptext.bench.sse import Events
from yaptext.bench.turn import Turn
from yaptext.client.errors import Refused

_OPEN_TIMEOUT_S = 10.0
_WARM_TIMEOUT_S = 120.0
_VLLM_RUNNING = re.compile(r"^vllm:num_requests_running(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class OpenAI:
    """A server whose base address is `url`, with or without its `/v1`."""

    name = "openai"

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        sampling: Sampling,
        *,
        in_roles: bool = False,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """`fields` are added to every request."""
        self.url, self._model, self._key = url.rstrip("/"), model, key
        self._fields = sampling.openai() | dict(fields or {})
        self._in_roles = in_roles
        self._getter = Getter(url, key)

    def conversation(self) -> Conversation:
        return OpenAIConversation(self.url, self._model, self._key, self._fields, in_roles=self._in_roles)

    async def idle_streams(self) -> float:
        """As vLLM tells it; other servers have no such figure."""
        status, text = await self._getter.get("/metrics")
        found = _VLLM_RUNNING.findall(text)
        if status != 200 or not found:
            raise Refused("/metrics has no vllm:num_requests_running")
        return sum(float(value) for value in found)

    def close(self) -> None:
        self._getter.close()


class OpenAIConversation:
    def __init__(self, url: str, model: str, key: str | None, fields: dict[str, Any], *, in_roles: bool) -> None:
        self._address = Address.parse(url)
        self._path = (self._address.path or "/v1") + "/chat/completions"
        self._model, self._key, self._fields = model, key, fields
        self._in_roles = in_roles
        self._story = Story("", "")
        self._said: list[dict[str, str]] = []
        self._stream: _Stream | None = None
        self.gone = asyncio.Event()
        self.closed_code: int | None = None
        self.strays = 0

    async def open(self) -> None:
        """Such a server refuses nobody before the first request."""
        self.gone.clear()
        self._stream = _Stream(self.gone, self._ask_anew)
        loop = asyncio.get_running_loop()
        address, stream = self._address, self._stream
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                await loop.create_connection(lambda: stream, address.host, address.port, ssl=address.tls)
        except (OSError, TimeoutError) as error:
            self._stream = None
            raise Refused(f"cannot connect to {address}: {error}") from None

    def meet(self, session: str, story: Story) -> None:
        self._story = story
        self._said = []

    @property
    def _told(self) -> list[dict[str, str]]:
        persona, history = self._story.persona, self._story.history
        if self._in_roles:
            return [{"role": "system", "content": persona}, *map(_message, history.splitlines())]
        now = datetime.now().strftime("%A, %H:%M")
        return [
            {"role": "system", "content": f"<|persona|>\n{persona}\n<|history|>\n{history}\nNow: {now}."},
        ]

    async def warm(self) -> None:
        turn = await self._ask([{"role": "user", "content": "."}], self._fields | {"max_tokens": 1}, "")
        try:
            async with asyncio.timeout(_WARM_TIMEOUT_S):
                await turn.over.wait()
        except TimeoutError:
            raise Refused(f"no answer in {_WARM_TIMEOUT_S:.0f} s") from None
        if turn.outcome != "done":
            raise Refused(f"the warm-up failed: {turn.error}")

    async def begin(self, utterance: str, *, part: str = "", again: bool = False) -> Turn:
        begun = time.perf_counter()
        self._cut(replaced=True)
        self._hear()
        if again:
            self._said = []
        self._said.append({"role": "user", "content": utterance})
        return await self._ask(self._said, self._fields, part, begun)

    def cancel(self) -> None:
        self._cut(replaced=False)

    def pause_reading(self) -> None:
        if self._stream is not None and self._stream.transport is not None:
            self._stream.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._stream is not None and self._stream.transport is not None:
            self._stream.transport.resume_reading()

    def drop(self) -> None:
        self._hear()
        if self._stream is not None:
            self._stream.stop("failed")
            self._stream = None

    async def close(self) -> None:
        self.drop()

    def _cut(self, *, replaced: bool) -> None:
        """Nothing arrives on a closed connection, so silence is immediate and says nothing: it is not measured."""
        if self._stream is not None and self._stream.turn is not None and self._stream.busy:
            self._hear()
            self._stream.turn.replaced = replaced
            self._stream.stop("cancelled")
            self._stream = None

    def _hear(self) -> None:
        """What has arrived of the last reply becomes a part of the conversation."""
        turn = self._stream.turn if self._stream is not None else None
        if turn is not None and self._said and self._said[-1]["role"] == "user":
            self._said.append({"role": "assistant", "content": "".join(turn.text)})

    async def _ask(
        self, said: list[dict[str, str]], fields: dict[str, Any], part: str, begun: float | None = None
    ) -> Turn:
        """One request, on a new connection where the last one is closed."""
        turn = Turn(begun or time.perf_counter(), part)
        if self._stream is None or self._stream.lost:
            try:
                await self.open()
            except Refused:
                turn.end("failed", time.perf_counter(), "closed")
                return turn
        body = {
            "model": self._model,
            "messages": [*self._told, *said],
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        assert self._stream is not None
        self._stream.send(request("POST", self._address, self._path, key=self._key, body=body), turn)
        return turn

    def _ask_anew(self, data: bytes, turn: Turn) -> None:
        async def ask() -> None:
            try:
                await self.open()
            except Refused:
                turn.end("failed", time.perf_counter(), "closed")
                return
            assert self._stream is not None
            self._stream.send(data, turn)

        self._asking = asyncio.create_task(ask())


def _message(line: str) -> dict[str, str]:
    """Of a line of a `Story`'s history."""
    speaker, _, text = line.partition(": ")
    return {"role": speaker.lower(), "content": text}


class _Stream(asyncio.Protocol):
    """One connection: a request out, the events of its answer into a turn. A server closes a connection that was idle
    for a while, perhaps just when a request comes: that is `again` then."""

    def __init__(self, gone: asyncio.Event, again: Callable[[bytes, Turn], None]) -> None:
        self._gone, self._again = gone, again
        self._answered = False
        self.transport: asyncio.Transport | None = None
        self.turn: Turn | None = None
        self.lost = False

    @property
    def busy(self) -> bool:
        return self.turn is not None and self.turn.outcome == "open"

    def send(self, data: bytes, turn: Turn) -> None:
        self.turn, self._response, self._events, self._data = turn, Response(), Events(), data
        assert self.transport is not None
        self.transport.write(data)

    def stop(self, outcome: Any) -> None:
        if self.turn is not None:
            self.turn.end(outcome, time.perf_counter(), "closed" if outcome == "failed" else None)
        self._leave()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.turn is None or self.turn.outcome != "open":
            return
        try:
            body = self._response.feed(data)
        except Malformed:
            self._fail("malformed", now)
            return
        if self._response.status not in (None, 200):
            if self._response.done:
                self._fail(f"http_{self._response.status}", now)
            return
        for event in self._events.feed(body):
            self._take(event, now)
        if self._response.done and self.busy:
            self.lost = not self._response.stays_open
            self._answered = True
            self.turn.end("done", now)

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True
        if self._answered and self.turn is not None and self.busy and self._response.status is None:
            self._again(self._data, self.turn)
            return
        self._gone.set()
        if self.turn is not None:
            self.turn.end("failed", time.perf_counter(), "closed")

    def _take(self, event: str, now: float) -> None:
        assert self.turn is not None
        if event == "[DONE]":
            return  # the answer goes on to its end, so that the connection can be used again
        try:
            content = json.loads(event)
        except ValueError:
            self._fail("malformed", now)
            return
        if "error" in content:
            self._fail("error_event", now)
            return
        for choice in content.get("choices") or ():
            text = (choice.get("delta") or {}).get("content")
            if text:  # the first event names only a role
                self.turn.token(text, now)
        usage = content.get("usage")
        if usage:
            self.turn.prompt_tokens = usage.get("prompt_tokens") or 0
            self.turn.completion_tokens = usage.get("completion_tokens") or 0
            self.turn.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def _fail(self, error: str, now: float) -> None:
        assert self.turn is not None
        self.turn.end("failed", now, error)
        self._leave()

    def _leave(self) -> None:
        self.lost = True
        if self.transport is not None:
            self.transport.abort()
