"""server/openai: hostile, slow and unlucky clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from conftest import Running, service, until
from doors import HTTP, ChatStream, House, ResponsesSocket, ResponsesStream, Visitor
from fakes import Gate, Script, ScriptedEngine
from server.test_chat_completions import KEY, body, door, prompts
from server.test_every_door import KeyFile, at, of, raw
from server.test_responses import ENDS, ask, connected, said, stream, text_of
from structlog.testing import capture_logs

from yaptext.engine.base import Engines
from yaptext.server.access import accounts
from yaptext.server.openai import completion

pytestmark = pytest.mark.asyncio(loop_scope="session")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WANTED = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
FORMAT = {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}


class Checking(ScriptedEngine):
    """Takes its time to check a schema."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checking, self.checked = 0, asyncio.Event()

    async def check_schema(self, schema: str) -> None:
        self.checking += 1
        try:
            await self.checked.wait()
        finally:
            self.checking -= 1


@asynccontextmanager
async def checking(door: type[Visitor], **variables: Any) -> AsyncIterator[tuple[House, Checking]]:
    from doors import house

    engine = Checking()
    async with house(door, Engines(engine, engine), **variables) as found:
        engine.requests.clear()
        yield found, engine


def with_schema(visitor: Visitor) -> dict[str, Any]:
    more = WANTED if "chat" in visitor.path else FORMAT
    return visitor.request("hi", None, (), None, "s") | more


# --- slow


async def exchanged(running: Running, *parts: bytes, pause_s: float = 0.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.bound_port)
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(pause_s)
        async with asyncio.timeout(30):
            return await reader.read()
    except ConnectionError:
        return b"cut"
    finally:
        writer.transport.abort()


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\nConnection: close\r\n"


async def test_a_body_that_comes_byte_by_byte_takes_no_slot_and_is_cut_off() -> None:
    """Within the time for a handshake."""
    async with door(HANDSHAKE_TIMEOUT_S=1) as (client, engine, running):
        head = HEAD % b"yap_token" + b"Content-Length: 1000\r\n\r\n"
        slow = asyncio.ensure_future(exchanged(running, head, *[b" "] * 100, pause_s=0.03))
        await asyncio.sleep(0.3)
        assert not running.active
        assert await slow in (b"", b"cut") and not engine.requests
        assert (await client.post("/v1/chat/completions", json=body())).status_code == 200


async def test_expect_continue_is_answered_once_the_key_is_known() -> None:
    content = json.dumps(body()).encode()
    more = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(content)
    async with door() as (_, _, running):
        answer = await exchanged(running, HEAD % b"yap_token" + more, content, pause_s=0.1)
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK") and b"Hello there." in answer
        assert (await exchanged(running, HEAD % b"wrong" + more)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("door", [ChatStream, ResponsesStream], ids=lambda door: door.__name__)
async def test_a_stream_whose_end_is_not_read_is_cut_off(door: type[Visitor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turn is over, and it may not hold its slot for ever."""
    monkeypatch.setattr(completion, "_FLUSH_TIMEOUT_S", 0.3)
    async with at(door, Script(["z" * 100_000] * 100), SEND_QUEUE_BYTES=67_108_864) as (found, engine):
        visitor = await found.visitor()
        async with raw(found, visitor, visitor.request("hi", None, (), None, "s")) as (_, writer):
            writer.transport.pause_reading()
            await until(lambda: engine.finished == 3 and not engine.running)
            assert found.running.active == 1
            await until(lambda: not found.running.active)


@pytest.mark.parametrize("door", [ResponsesStream, ResponsesSocket], ids=lambda door: door.__name__)
async def test_a_slow_reader_gets_every_number_once(door: type[Visitor]) -> None:
    """Tokens that wait leave together, and events before them keep their place."""
    pieces = [f"{number} " * 10_000 for number in range(400)]
    async with at(
        door, Script(pieces, pace=lambda: asyncio.sleep(0)), SEND_QUEUE_BYTES=200_000_000, CHAT_MAX_OUT=1000
    ) as (found, engine):
        if door is ResponsesSocket:
            async with connected(found.running) as socket:
                await socket.create()
                await until(lambda: engine.finished == 3)
                await asyncio.sleep(0.1)
                events = await socket.until(*ENDS)
        else:
            async with httpx.AsyncClient(base_url=found.running.http, headers=KEY, timeout=30) as client:
                wanted = {"model": "chat", "input": "hi", "stream": True}
                async with client.stream("POST", "/v1/responses", json=wanted) as answer:
                    await until(lambda: engine.finished == 3)
                    await asyncio.sleep(0.1)
                    lines = [line async for line in answer.aiter_lines()]
                events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert said(events) == text_of(events[-1]["response"]) == "".join(pieces)
        assert 10 < len(events) < len(pieces), "some left at once, and many together"


async def test_what_waited_at_a_cancel_is_not_in_the_text() -> None:
    """The text of the last events is what was sent before them."""
    pieces = [f"{number} " * 10_000 for number in range(500)]
    gate = Gate()
    async with at(ResponsesSocket, Script(pieces, pace=gate), SEND_QUEUE_BYTES=200_000_000, CHAT_MAX_OUT=1000) as (
        found,
        engine,
    ):
        async with connected(found.running) as socket:
            await socket.create()
            for count in (400, 50, 49):  # what waits leaves in one frame, which is all that the socket takes
                gate.step(count)
                await until(lambda: gate.waiting == 1 and not gate._permits._value)
            await socket.cancel()
            await until(lambda: engine.aborted == 1)
            events = await socket.until(*ENDS)
            texts = [event["text"] for event in events if event["type"] == "response.output_text.done"]
            sent = said(events)
            assert texts == [sent] == [text_of(events[-1]["response"])]
            assert "".join(pieces).startswith(sent) and 0 < len(sent) < len("".join(pieces[:499]))
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            engine.chat = Script()
            assert said(await socket.ask(previous_response_id=events[-1]["response"]["id"])) == "Hello there."


# --- while a request is checked


@of([*HTTP, ResponsesSocket])
async def test_a_removed_key_and_a_dead_engine_end_a_request_that_is_checked(door: Any, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys", a="")
    async with checking(door, YAP_TEXT_KEY_FILE=keys.path) as (found, engine):
        visitor = await found.visitor("a-key")
        exchange = await visitor.send(with_schema(visitor))
        await until(lambda: engine.checking == 1)
        keys.write()
        os.kill(os.getpid(), signal.SIGHUP)
        if door is ResponsesSocket:
            assert await visitor.until_closed() == 1008
        else:
            await asyncio.sleep(0.1)
            engine.checked.set()
            assert (await exchange.end()).error == "authentication_failed"
        await until(lambda: not found.running.active and not engine.checking)
        assert not engine.requests and found.service.runtime.metrics.running_turns == 0


@of([*HTTP, ResponsesSocket])
async def test_a_client_that_leaves_while_its_request_is_checked_costs_no_reply(door: Any) -> None:
    async with checking(door) as (found, engine):
        visitor = await found.visitor()
        await visitor.send(with_schema(visitor))
        await until(lambda: engine.checking == 1)
        await visitor.leave()
        await asyncio.sleep(0.1)
        engine.checked.set()
        await until(lambda: not found.running.active and not engine.running)
        assert len(engine.requests) <= 1 and engine.finished <= 2, "at most the step in which it is noticed"
        session = found.service.runtime.sessions.find(("default", "s"))
        assert session is None or not session.in_use


@of([*HTTP, ResponsesSocket])
async def test_a_session_that_is_forgotten_while_a_request_is_checked_is_not_kept(door: Any) -> None:
    async with checking(door) as (found, engine):
        visitor = await found.visitor()
        exchange = await visitor.send(with_schema(visitor))
        await until(lambda: engine.checking == 1)
        async with found.running.connect() as socket:
            await socket.send(json.dumps({"type": "forget", "session_id": "s"}))
            assert json.loads(await socket.recv())["known"]
        engine.checked.set()
        await exchange.end()
        await until(lambda: not engine.running and not found.service.runtime.metrics.running_turns)
        await asyncio.sleep(0.05)
        assert found.service.runtime.sessions.find(("default", "s")) is None
        assert found.service.runtime.kept.bytes == 0


async def test_a_drain_waits_for_a_request_that_is_checked() -> None:
    async with checking(ChatStream) as (found, engine):
        visitor = await found.visitor()
        exchange = await visitor.send(with_schema(visitor))
        await until(lambda: engine.checking == 1)
        found.running.server.begin_drain()
        await asyncio.sleep(0.1)
        engine.decision = Script(('{"a":1}',))
        engine.checked.set()
        outcome = await exchange.end()
        assert (outcome.error, outcome.text) == (None, '{"a":1}')
        await found.running.server.drained


# --- many


async def test_a_drain_ends_hundreds_of_streams_and_sockets() -> None:
    """Turns end normally, sockets that rest are closed, and nothing is left."""
    gate, engine = Gate(), ScriptedEngine()
    async with service(Engines(engine, engine), MAX_CONCURRENT_CONNECTIONS=500) as running:
        engine.chat = Script(pace=gate)
        kinds: list[type[Visitor]] = [ChatStream, ResponsesStream, ResponsesSocket]
        visitors = [await kinds[number % 3](running, dict(KEY)).__aenter__() for number in range(240)]
        resting = [await ResponsesSocket(running, dict(KEY)).__aenter__() for _ in range(100)]
        exchanges = [await visitor.begin(session=f"s{n}") for n, visitor in enumerate(visitors)]
        await until(lambda: engine.running == 240)
        running.server.begin_drain()
        await until(lambda: running.server.lifecycle.phase == "draining")
        gate.step(10_000)
        outcomes = [await exchange.end() for exchange in exchanges]
        assert {(each.error, each.text) for each in outcomes} == {(None, "Hello there.")}
        assert {await visitor.until_closed() for visitor in resting} == {1012}  # type: ignore[attr-defined]
        await running.server.drained
        assert not running.active and not engine.running
        for visitor in (*visitors, *resting):
            await visitor.leave()


async def test_a_burst_of_a_thousand_frames_is_answered_frame_by_frame() -> None:
    gate = Gate()
    async with (
        door(Script(pace=gate)) as (_, engine, running),
        connected(running) as socket,
        connected(running) as other,
    ):
        for number in range(1000):
            await socket.create(f"n{number}", user=f"u{number}")
        refused = [await socket.until("error") for _ in range(991)]
        assert {events[-1]["error"]["code"] for events in refused} == {"rate_limit_exceeded"}
        gate.step(100)
        assert (await other.ask())[-1]["type"] == "response.completed"
        ends = [(await socket.until(*ENDS))[-1]["type"] for _ in range(9)]
        assert ends == ["response.completed"] * 9 and len(engine.requests) == 10


async def test_what_waits_on_a_socket_is_bounded_in_bytes() -> None:
    gate = Gate()
    async with door(Script(pace=gate), MAX_FRAME_BYTES=100_000) as (_, engine, running), connected(running) as socket:
        await socket.create()
        await until(lambda: engine.running == 1)
        long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 20_000}]
        for _ in range(4):
            await socket.create([*long, {"role": "user", "content": "c"}])
        event = (await socket.until("error"))[-1]
        assert event["status"] == 429 and "bytes wait on this socket; limit is 100000" in event["error"]["message"]
        gate.step(100)
        assert [(await socket.until(*ENDS))[-1]["type"] for _ in range(4)].count("response.completed") == 3


async def test_a_storm_of_cancels_ends_what_it_meets_and_nothing_else(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys", a="cancels_per_minute=300")
    gate = Gate()
    async with door(Script(["a"] * 50, pace=gate), YAP_TEXT_KEY_FILE=keys.path) as (_, engine, running):
        async with connected(running, "a-key") as socket:
            for _ in range(100):
                await socket.create()
                for _ in range(3):
                    await socket.cancel()
                assert (await socket.until(*ENDS))[-1]["response"]["status"] == "cancelled"
            for _ in range(100):
                await socket.cancel()
            assert (await socket.next())["error"]["code"] == "rate_limit_exceeded"
            await asyncio.sleep(0.1)
            gate.step(100)
            await socket.create()
            assert (await socket.until("response.completed"))[-1]["response"]["status"] == "completed"
            await until(lambda: not engine.running)


async def test_a_chain_of_responses_stays_as_long_as_a_prompt_may_be() -> None:
    """Each continues the one before; what is kept of each is bounded, and so is its time."""
    async with door() as (_, engine, running), connected(running) as socket:
        kept, before, sizes = running.server.lifespan.state["service"].runtime.kept, None, []
        for number in range(150):
            events = await socket.ask(f"{number} " + "word " * 90, previous_response_id=before)
            before = events[-1]["response"]["id"]
            sizes.append(kept.find("default", before).bytes)
        assert sizes[-1] < 2 * max(sizes[:100]) and "149 word" in prompts(engine)[-1]
        assert len(prompts(engine)[-1]) < 2 * len(prompts(engine)[80])


async def test_two_sockets_continue_one_response() -> None:
    async with door() as (_, engine, running), connected(running) as one, connected(running) as two:
        first = (await one.ask("first"))[-1]["response"]["id"]
        for socket, text in ((one, "left"), (two, "right")):
            await socket.create(text, previous_response_id=first)
        ends = [(await socket.until(*ENDS))[-1]["response"] for socket in (one, two)]
        assert [end["status"] for end in ends] == ["completed"] * 2 and ends[0]["id"] != ends[1]["id"]
        left, right = (next(each for each in prompts(engine) if text in each) for text in ("left", "right"))
        assert "right" not in left and "left" not in right and "first" in left and "first" in right


# --- odd


@pytest.mark.parametrize(
    "model", ["%00", "%FF%FE", "%ED%A0%80", "%F0%9F%98%80", "a" * 4000, "persona%2F..%2Fx", "%22%7D"]
)
async def test_an_odd_model_in_the_address_is_an_unknown_model(model: str) -> None:
    async with door() as (_, _, running), connected(running, path=f"/v1/responses?model={model}") as socket:
        await socket.socket.send('{"type": "response.create", "input": "hi"}')
        event = await socket.next()
        assert (event["type"], event["status"], event["error"]["code"]) == ("error", 404, "model_not_found")
        assert len(event["error"]["message"]) < 2000
        assert (await socket.ask())[-1]["type"] == "response.completed"


DEEP = "[" * 5000 + "]" * 5000


def _list(item: str, count: int) -> str:
    return f"[{','.join([item] * count)}]"


ITEMS, LONG = _list("{}", 70_000), "x" * 20_000
PARTS, SYSTEMS = _list('{"type":"text"}', 2000), _list('{"role":"system","content":"a"}', 9000)
ODD = {
    "surrogate": '"input": "\\ud800"',
    "surrogates": '"input": "hi", "user": "\\udc00\\ud800"',
    "deep metadata": f'"input": "hi", "metadata": {{"a": {DEEP}}}',
    "deep input": f'"input": {DEEP}',
    "deep tools": f'"input": "hi", "tools": [{{"name": "a", "parameters": {DEEP}}}]',
    "deep format": f'"input": "hi", "text": {{"format": {{"type": "json_schema", "schema": {{"a": {DEEP}}}}}}}',
    "items": f'"input": {ITEMS}',
    "parts": f'"input": [{{"role": "user", "content": {PARTS}}}]',
    "long metadata": f'"input": "hi", "metadata": {{"a": "{LONG}"}}',
    "systems": f'"input": {SYSTEMS}',
    "two types": '"type": "response.cancel", "input": 1, "response_id": []',
    "no input": '"input": 1',
}


@pytest.mark.parametrize("kind", ODD)
async def test_an_odd_frame_is_an_error_and_the_socket_goes_on(kind: str) -> None:
    async with door() as (client, engine, running), connected(running) as socket:
        frame = f'{{"type": "response.create", {ODD[kind]}}}'
        await socket.socket.send(frame)
        event = await socket.next()
        assert (event["type"], event["status"]) == ("error", 400) and len(event["error"]["message"]) < 1000
        assert said(await socket.ask()) == "Hello there."
        assert (await client.post("/v1/responses", content=frame)).status_code == 400
        assert len(engine.requests) == 1


async def test_ten_thousand_calls_with_one_id_are_read() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": "x"}
    async with door() as (client, engine, running), connected(running) as socket:
        for given in ([call] * 8000, [call, output] * 4000, [output] * 8000):
            again = [*given, {"role": "user", "content": "hi"}]
            assert text_of(await ask(client, again)) == "Hello there."
            assert said(await socket.ask(again)) == "Hello there."
        assert max(len(ids) for ids, _, _ in engine.requests) < 4096


async def test_a_schema_is_charged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "_NEW_TOOLS_PER_MINUTE", 1)
    keys = KeyFile(tmp_path / "keys", a="")
    async with door(YAP_TEXT_KEY_FILE=keys.path) as (client, _, running), connected(running, "a-key") as socket:
        client.headers["Authorization"] = "Bearer a-key"
        for _ in range(3):
            assert (await client.post("/v1/chat/completions", json=body(**WANTED))).status_code == 200
            await ask(client, **FORMAT)
            assert (await socket.ask(**FORMAT))[-1]["type"] == "response.completed"
        other = {"text": {"format": FORMAT["text"]["format"] | {"schema": {"type": "object"}}}}
        event = (await socket.ask(**other))[-1]
        assert event["status"] == 429 and "out of tools" in event["error"]["message"]


async def test_the_log_does_not_have_who_the_user_is() -> None:
    """`user` may be an address; one user has one name in the log."""
    with capture_logs() as lines:
        async with door() as (client, _, running), connected(running) as socket:
            await client.post("/v1/chat/completions", json=body(user="ada@example.com"))
            await stream(client, user="ada@example.com")
            await socket.ask(user="ada@example.com")
            await socket.ask(user="bob@example.com")
            await socket.ask(metadata={"session_id": "call-1"}, user="ada@example.com")
            assert (
                running.server.lifespan.state["service"].runtime.sessions.find(("default", "ada@example.com"))
            ).turns
    names = [line["session_id"] for line in lines if line["event"] == "turn.finished"]
    assert names[0] == names[1] == names[2] != names[3] and names[4] == "call-1"
    assert names[0].startswith("user-") and "@" not in json.dumps(lines, default=str)


async def test_a_client_that_reconnects_in_a_hurry_leaves_nothing() -> None:
    """Sockets that close in the middle of whatever they do."""
    async with door(Script(["a"] * 50, pace=lambda: asyncio.sleep(0.001))) as (_, engine, running):
        for number in range(60):
            async with connected(running) as socket:
                for _ in range(number % 4):
                    await socket.create(user="u")
                if number % 3:
                    await asyncio.sleep(number / 3000)
                if number % 5 == 0:
                    socket.socket.transport.abort()
        await until(lambda: not running.active and not engine.running)
        runtime = running.server.lifespan.state["service"].runtime
        assert runtime.metrics.running_turns == 0
        session = runtime.sessions.find(("default", "u"))
        assert session is None or not session.in_use
        async with connected(running) as socket:
            assert (await socket.ask(user="u"))[-1]["type"] == "response.completed"


async def test_a_create_that_comes_with_the_end_is_not_begun() -> None:
    async with door() as (_, engine, running):
        for _ in range(20):
            async with connected(running) as socket:
                sending = [asyncio.ensure_future(socket.create()) for _ in range(5)]
                await socket.socket.close()
                await asyncio.gather(*sending, return_exceptions=True)
                with pytest.raises(websockets.ConnectionClosed):
                    while True:
                        await socket.next()
        await until(lambda: not running.active and not engine.running)
