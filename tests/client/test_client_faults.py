"""The client against a service, a network or a caller that does what it should not."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import websockets
from conftest import service, until
from fakes import Gate, Script, ScriptedEngine
from other_server import ACK, TURN, serving

from yaptext.client import (
    BadMessage,
    ConnectionLost,
    Done,
    GoingAway,
    Refused,
    TicketFailed,
    YapTextError,
    connect,
    sync,
)
from yaptext.client import client as clients
from yaptext.engine.base import Engines

KEY = "yap_token"
CALL = [{"id": "1", "name": "lamp", "arguments": {}}]


async def silence(socket: websockets.ServerConnection) -> None:
    await socket.wait_closed()


def silent_after(*frames: dict[str, Any]) -> Callable[[websockets.ServerConnection], Coroutine[Any, Any, None]]:
    """Answers the first frame so, and no other; pings of the library are answered."""

    async def talk(socket: websockets.ServerConnection) -> None:
        await socket.recv()
        for frame in frames:
            await socket.send(json.dumps(frame))
        await socket.wait_closed()

    return talk


# --- a service that does not answer


async def test_a_done_that_never_comes_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that stops waiting leaves the block of the turn, and the next call finds another socket."""
    monkeypatch.setattr(clients, "_CANCELLED_WITHIN_S", 0.2)
    async with serving(silent_after(*TURN[:2])) as url, connect(url, "k") as yap:
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), yap.turn("hi") as turn:
                await turn.result()
        assert time.monotonic() - begun < 3 and turn.text == "a" and turn.over
        with pytest.raises(ConnectionLost, match=r"no answer in 0\.2 s"):
            await turn.result()
        async with asyncio.timeout(5), yap.turn("again") as turn:
            assert turn.number == 1


async def test_an_ack_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry may help: the socket is replaced."""
    monkeypatch.setattr(clients, "_ANSWER_WITHIN_S", 0.2)
    async with serving(silence) as url, connect(url, "k") as yap:
        async with asyncio.timeout(5):
            for call in (yap.turn("hi").begin, yap.ping, yap.get_session):
                with pytest.raises(ConnectionLost, match=r"no answer in 0\.2 s") as raised:
                    await call()
                assert raised.value.retryable


async def test_a_service_that_does_not_read_cannot_hold_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a call with a large frame, nor the end."""
    monkeypatch.setattr(clients, "_ANSWER_WITHIN_S", 0.3)

    async def deaf(socket: websockets.ServerConnection) -> None:
        socket.transport.pause_reading()
        await asyncio.sleep(2)
        socket.transport.abort()

    begun = time.monotonic()
    async with serving(deaf) as url:
        async with connect(url, "k", ping_interval=None) as yap:
            with pytest.raises(ConnectionLost):
                await yap.turn("hi", history="a" * 30_000_000).begin()
        assert time.monotonic() - begun < 5


async def test_a_service_that_says_come_at_once_is_not_stormed() -> None:
    """`retry_after_ms` 0 from one that has no room."""
    came = 0

    async def talk(socket: websockets.ServerConnection) -> None:
        nonlocal came
        came += 1
        if came > 1:
            frame = {"type": "error", "error_code": "server_at_capacity", "message": "full", "retry_after_ms": 0}
            await socket.send(json.dumps(frame))
        await socket.close(1013)

    async def answering(socket: websockets.ServerConnection) -> None:
        await socket.recv()
        if not came:
            await socket.send('{"type":"pong"}')
        await talk(socket)

    async with websockets.serve(answering, "127.0.0.1", 0) as server:
        async with connect(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws", "k"):
            await asyncio.sleep(1)
    assert 2 < came < 13


async def test_a_turn_that_a_stopping_service_did_not_begin_waits_for_the_next() -> None:
    """It is sent once more, after the time that the service asks for, if it is still wanted; as client.js does it.
    Without a next socket the caller hears why."""
    came: list[float] = []

    async def talk(socket: websockets.ServerConnection) -> None:
        await socket.recv()
        came.append(time.monotonic())
        if len(came) in (1, 3, 5):
            frame = {"type": "error", "error_code": "going_away", "message": "restart", "retry_after_ms": 200}
            await socket.send(json.dumps(frame))
            await socket.close(1012)
            return
        for frame in TURN:
            await socket.send(json.dumps(frame))
        await socket.wait_closed()

    async with serving(talk) as url:
        async with asyncio.timeout(10), connect(url, "k") as yap, yap.turn("hi") as turn:
            assert (await turn.result()).text == "a" and not turn.cancelled
        assert len(came) == 2 and came[1] - came[0] >= 0.2
        async with connect(url, "k") as yap:
            turn = yap.turn("hi")
            beginning = asyncio.create_task(turn.begin())
            await until(lambda: len(came) == 3)
            await turn.cancel()
            assert (await beginning).cancelled
            assert await yap.turn("newer").begin() and len(came) == 4
        with pytest.raises(GoingAway) as raised:
            async with connect(url, "k", reconnect=False) as yap:
                await yap.turn("hi").begin()
        assert raised.value.retry_after_ms == 200 and len(came) == 5


# --- what a caller gives


@pytest.mark.parametrize(
    "url", ["ws://127.0.0.1:99999/ws", f"ws://{'a' * 70}.example/ws", "ws://a..b/ws", "http://x/?ticket=secret"]
)
async def test_an_address_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(Refused, match=r"^cannot connect to ") as raised:
        async with connect(url, "k"):
            pytest.fail("that is no address")
    assert not raised.value.retryable and "secret" not in str(raised.value)


@pytest.mark.parametrize("key", ["secret\n", "a\r\nX-Evil: secret", "secret\x00", "secret\ud800"])
async def test_a_key_that_is_no_header_is_refused_unseen(key: str) -> None:
    """For example one of a file, with its last line break."""
    with pytest.raises(Refused, match="line break") as raised:
        async with connect("ws://127.0.0.1:1/ws", key):
            pytest.fail("that is no key")
    assert "secret" not in str(raised.value) and not raised.value.retryable


async def test_half_a_character_is_named_before_anything_is_sent() -> None:
    async with serving(silence) as url, connect(url, "k") as yap:
        with pytest.raises(BadMessage, match="half a character"):
            yap.turn("\ud83d")


# --- two at once, and those that leave


async def test_two_turns_at_once_from_two_tasks() -> None:
    """One of them ends the other, and each task comes to an end; the last one has its reply."""
    gate, engine = Gate(), ScriptedEngine(chat=Script(["One", " two"]))
    async with service(Engines(engine, engine)) as running, connect(running.ws, KEY) as yap:
        engine.chat.pace = gate
        turns = [yap.turn(str(number)) for number in range(2)]

        async def hold(turn: Any) -> list[Any]:
            async with turn:
                return [event async for event in turn]

        tasks = [asyncio.create_task(hold(turn)) for turn in turns]
        async with asyncio.timeout(20):
            while not any(task.done() for task in tasks):
                gate.step()
                await asyncio.sleep(0.01)
            gate.step(9)
            events = await asyncio.gather(*tasks)
        assert all(isinstance(each[-1], Done) for each in events)
        assert [turn.cancelled for turn in turns] == [True, False] and turns[1].text == "One two"


async def test_a_cancelled_task_leaves_no_turn_running() -> None:
    """Nor a slot."""
    gate, engine = Gate(), ScriptedEngine(chat=Script(["One", " two"]))
    async with service(Engines(engine, engine)) as running, connect(running.ws, KEY) as yap:
        engine.chat.pace = gate

        async def hold() -> None:
            async with yap.turn("hi") as turn:
                await turn.result()

        task = asyncio.create_task(hold())
        async with asyncio.timeout(20):
            await until(lambda: gate.waiting == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not engine.running)
        assert engine.aborted == 1


async def test_a_tool_that_is_cancelled_is_an_error_of_the_tool() -> None:
    """Not the end of the task that reads the turn."""
    seen: list[Any] = []

    async def talk(socket: websockets.ServerConnection) -> None:
        await socket.recv()
        done = {"type": "done", "turn": 1, "finish_reason": "tool_calls"}
        for frame in (ACK, {"type": "toolcall", "status": "yes", "raw": CALL, "turn": 1, "tool_ms": 1.0}, done):
            await socket.send(json.dumps(frame))
        seen.append(json.loads(await socket.recv()))
        for frame in ({**ACK, "for": "tool_result", "turn": 2}, {"type": "done", "turn": 2}):
            await socket.send(json.dumps(frame))
        await socket.wait_closed()

    async def lamp() -> str:
        raise asyncio.CancelledError

    async with serving(talk) as url, connect(url, "k") as yap:
        async with asyncio.timeout(5), yap.turn("hi", tools=[({"name": "lamp"}, lamp)]) as turn:
            await turn.result()
    assert seen[0]["results"] == [{"id": "1", "content": "error: CancelledError"}]


async def test_a_closed_client_says_so() -> None:
    """To the turn that ran, and to calls that come later."""
    async with serving(silent_after(*TURN[:2])) as url:
        async with connect(url, "k") as yap:
            turn = await yap.turn("hi").begin()
        with pytest.raises(Refused, match="the client is closed"):
            await turn.result()
        with pytest.raises(Refused, match="the client is closed"):
            await yap.ping()


# --- tickets


async def test_a_ticket_is_asked_for_each_connection() -> None:
    """By a function or a coroutine function. It stands in the address, and no key in a header."""
    tickets: list[str] = []
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        keys = running.server.lifespan.state["service"].keys
        account = next(iter(keys._accounts.values()), None) or keys._account(keys._own[0].hash)

        def ticket() -> str:
            tickets.append(keys.ticket(account))
            return tickets[-1]

        async def later() -> str:
            return ticket()

        for callback in (ticket, later, partial(later)):
            async with connect(running.ws, ticket=callback) as yap:
                async with yap.turn("hi") as turn:
                    assert (await turn.result()).text == "Hello there."
                assert yap._link.socket is not None and yap._link.socket.request is not None
                assert "X-API-Key" not in yap._link.socket.request.headers
                yap._link.socket.transport.abort()
                await until(lambda yap=yap: yap._link.socket is None)
                async with yap.turn("again") as turn:
                    await turn.result()
        assert len(set(tickets)) == 6


async def test_a_ticket_that_is_not_to_be_had_is_tried_again() -> None:
    """Not for the first connection, as with a key; the network of the backend may be back for a later one."""

    def never() -> str:
        raise OSError("no network")

    with pytest.raises(TicketFailed, match=r"^no ticket: no network$") as raised:
        async with connect("ws://127.0.0.1:1/ws", ticket=never):
            pytest.fail("there is no ticket")
    assert raised.value.retryable and raised.value.code == "ticket_failed"
    asked: list[str] = []
    paths: list[str] = []

    def second() -> str:
        asked.append("x")
        if len(asked) == 2:
            raise OSError("no network")
        return f"a&b={len(asked)}"

    async def talk(socket: websockets.ServerConnection) -> None:
        assert socket.request is not None
        paths.append(socket.request.path)
        await (socket.close(1012) if len(paths) == 1 else socket.wait_closed())

    async with serving(talk) as url, connect(f"{url}?zone=1", ticket=second):
        await until(lambda: len(paths) == 2)
    assert paths == ["/ws?zone=1&ticket=a%26b%3D1", "/ws?zone=1&ticket=a%26b%3D3"]


async def test_a_key_or_a_ticket() -> None:
    for access in ({}, {"key": "k", "ticket": lambda: "t"}):
        with pytest.raises(TypeError, match="either key or ticket"):
            async with connect("ws://127.0.0.1:1/ws", **access):
                pytest.fail("neither or both")


# --- the twin without async


async def against(talk: Any, use: Callable[[str], None]) -> None:
    async with serving(talk) as url:
        await asyncio.to_thread(use, url)


async def test_the_twin_is_closed_once_and_says_so() -> None:
    """To calls that come later, to a second close, and to a thread that waits in a turn."""

    def use(url: str) -> None:
        caught: list[BaseException] = []
        opening = sync.connect(url, "k")
        yap = opening.__enter__()
        turn = yap.turn("hi").begin()

        def read() -> None:
            try:
                turn.result()
            except BaseException as error:
                caught.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        opening.__exit__(None, None, None)
        reader.join(10)
        assert [type(error) for error in caught] == [Refused]
        for call in (yap.ping, turn.cancel, turn.result, yap.get_session, lambda: yap.turn("x").begin()):
            with pytest.raises(Refused, match="the client is closed"):
                call()

    await against(silent_after(*TURN[:2]), use)


async def test_calls_of_other_threads_at_the_end_come_back() -> None:
    """However they and the end of the block interleave."""

    async def talk(socket: websockets.ServerConnection) -> None:
        async for _ in socket:
            await socket.send('{"type":"pong"}')

    def use(url: str) -> None:
        for _ in range(20):
            over = threading.Event()

            def call(yap: sync.Yap, over: threading.Event) -> None:
                while not over.is_set():
                    with suppress(YapTextError):
                        yap.ping()

            with sync.connect(url, "k") as yap:
                threads = [threading.Thread(target=call, args=(yap, over), daemon=True) for _ in range(4)]
                for thread in threads:
                    thread.start()
                time.sleep(0.01)
            time.sleep(0.01)
            over.set()
            for thread in threads:
                thread.join(5)
                assert not thread.is_alive()

    await against(talk, use)


@pytest.mark.subprocess
async def test_ctrl_c_ends_the_twin_wherever_it_waits() -> None:
    """In a turn, whose cancel is sent, and while it connects; nothing is left, and nothing is said of it."""
    program = """
import sys
from yaptext.client.sync import connect
url, say = sys.argv[1], lambda text: print(text, flush=True)
say("connecting")
try:
    with connect(url, "k") as yap:
        with yap.turn("hi") as turn:
            say("in a turn")
            turn.result()
except KeyboardInterrupt:
    say("left")
"""
    told: list[str] = []

    async def talk(socket: websockets.ServerConnection) -> None:
        async for frame in socket:
            told.append(json.loads(frame)["type"])
            if told[-1] == "start":
                await socket.send(json.dumps(ACK))
            elif told[-1] == "cancel":
                await socket.send('{"type":"done","turn":1,"cancelled":true}')

    left = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    async def run(url: str, waits_at: str) -> tuple[str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-X", "dev", "-c", program, url,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        while waits_at.encode() not in await process.stdout.readline():
            pass
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 20)
        return out.decode().strip(), err.decode()

    async with serving(talk) as url:
        assert await run(url, "in a turn") == ("left", "")
    assert told == ["start", "cancel", "end"]
    async with await asyncio.start_server(mute, "127.0.0.1", 0) as server:
        assert await run(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws", "connecting") == ("left", "")
        await asyncio.wait_for(left.wait(), 20)
