"""client/link.py: what the client does when its socket breaks."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets
from conftest import service, until
from fakes import Gate, Script, ScriptedEngine

from yaptext.client import (
    AuthenticationFailed,
    ConnectionLost,
    GoingAway,
    Refused,
    ServerAtCapacity,
    Token,
    YapTextError,
    connect,
)
from yaptext.client import link as links
from yaptext.engine.base import CHAT, Engines
from yaptext.server import lifecycle

KEY = "yap_token"


def chat_only() -> tuple[ScriptedEngine, Engines]:
    engine = ScriptedEngine()
    return engine, Engines(engine, None)


async def test_a_restart_of_the_service_resumes_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running turn fails with an error that says when to come back; the next call waits no shorter than that, and
    the new process knows what was said."""
    monkeypatch.setattr(lifecycle, "_RETRY_AFTER_MS", (800, 800))
    stored: dict[str, Any] = {
        "DEPLOY_MODELS": "chat",
        "YAP_TEXT_STATE_DIR": tmp_path,
        "SESSION_STORE": "sqlite:sessions.db",
        "DRAIN_TIMEOUT_S": 0,
    }
    engine, engines = chat_only()
    async with service(engines, **stored) as running:
        port, opening = running.server.bound_port, connect(running.ws, KEY)
        yap = await opening.__aenter__()
        async with yap.turn("remember four", persona_text="You are Ada.") as turn:
            await turn.result()
        engine.chat = Script(["Five", " it"], pace=Gate())
        turn = await yap.turn("and five").begin()
        running.server.begin_drain()
        with pytest.raises(GoingAway) as raised:  # a turn that the drain cut ends first
            await turn.result()
            await yap.ping()
            await yap.get_session()
        lost_at = time.monotonic()
        assert raised.value.retryable and raised.value.retry_after_ms
        assert running.server.drained is not None
        await running.server.drained
    engine, engines = chat_only()
    async with service(engines, **stored, PORT=port):
        try:
            async with yap.turn("the sum?") as turn:
                assert (await turn.result()).text == "Hello there."
            assert time.monotonic() - lost_at >= 0.7
            asked = [ids for ids, _, priority in engine.requests if priority == CHAT]
            for text in ("You are Ada.", "remember four", "and five", "the sum?"):
                assert text in engine.decode(asked[-1]), text
        finally:
            await opening.__aexit__(None, None, None)


async def test_a_turn_whose_socket_breaks_is_retryable_and_the_session_goes_on() -> None:
    """The network goes in the middle of a reply: the next turn has a new socket, and the same session."""
    engine, engines = chat_only()
    async with service(engines, DEPLOY_MODELS="chat") as running, connect(running.ws, KEY) as yap:
        engine.chat = Script(["Four", " it", " is"], pace=(gate := Gate()))
        with pytest.raises(ConnectionLost) as raised:
            async with yap.turn("four?") as turn:
                gate.step()
                async for event in turn:
                    if isinstance(event, Token):
                        assert yap._link.socket is not None
                        yap._link.socket.transport.abort()
        assert (raised.value.close_code, raised.value.retryable) == (1006, True)
        assert turn.over and turn.text == "Four"
        await turn.cancel()
        engine.chat = Script()
        async with yap.turn("and?") as turn:
            assert (await turn.result()).number == 2
        assert (await yap.get_session()).history[1].content == "Four"


async def test_what_was_heard_of_the_last_reply_can_be_said_after_a_reconnect() -> None:
    """The cancel names the session."""
    _, engines = chat_only()
    async with service(engines, DEPLOY_MODELS="chat") as running, connect(running.ws, KEY) as yap:
        async with yap.turn("hi") as turn:
            await turn.result()
        assert yap._link.socket is not None
        yap._link.socket.transport.abort()
        await until(lambda: yap._link.socket is None)
        await turn.cancel(heard_text="hello")
        assert (await yap.get_session()).history[-1].content == "Hello"


async def test_an_idle_socket_is_replaced_by_the_next_call_only() -> None:
    """Until then its slot belongs to others."""
    _, engines = chat_only()
    async with service(engines, DEPLOY_MODELS="chat", IDLE_TIMEOUT_S=0.2) as running:
        async with connect(running.ws, KEY) as yap:
            await until(lambda: yap._link.socket is None)
            await asyncio.sleep(0.5)
            assert running.active == 0
            async with yap.turn("hi") as turn:
                assert (await turn.result()).text == "Hello there."


async def test_a_frame_over_the_limit_does_not_end_the_conversation() -> None:
    """It is not sent again; the next call opens a socket."""
    _, engines = chat_only()
    async with service(engines, DEPLOY_MODELS="chat", MAX_FRAME_BYTES=2048) as running:
        async with connect(running.ws, KEY) as yap:
            with pytest.raises(ConnectionLost) as raised:
                await yap.turn("hi", history="User: " + "x" * 4096).begin()
            assert (raised.value.close_code, raised.value.retryable) == (1009, False)
            async with yap.turn("hi") as turn:
                assert (await turn.result()).text == "Hello there."


async def test_without_reconnect_the_first_loss_is_the_last() -> None:
    """Every later call says why."""
    _, engines = chat_only()
    async with service(engines, DEPLOY_MODELS="chat") as running:
        async with connect(running.ws, KEY, reconnect=False) as yap:
            assert yap._link.socket is not None
            yap._link.socket.transport.abort()
            for _ in range(2):
                with pytest.raises(ConnectionLost):
                    await yap.ping()
            await until(lambda: running.active == 0)


async def test_a_key_that_was_removed_is_not_tried_again() -> None:
    """After a broken socket the service refuses the key: no call waits for that."""
    answers = iter([{"type": "pong"}, {"type": "error", "error_code": "authentication_failed", "message": "no"}])
    seen: list[Any] = []

    async def talk(socket: websockets.ServerConnection) -> None:
        seen.append(await socket.recv())
        await socket.send(json.dumps(next(answers)))
        if len(seen) == 1:
            socket.transport.abort()
        else:
            await socket.close(1008)

    async with fake(talk) as url, connect(url, "k") as yap:
        await until(lambda: yap._link.socket is None)
        for _ in range(2):
            with pytest.raises(AuthenticationFailed):
                await yap.ping()
    assert len(seen) == 2


@asynccontextmanager
async def fake(talk: Any) -> AsyncIterator[str]:
    async with websockets.serve(talk, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"


async def test_it_waits_as_long_as_it_is_told_and_longer_each_time_if_not() -> None:
    """A full service is asked again after its `retry_after_ms`; a socket that breaks at once, after growing times."""
    times: list[float] = []
    told = {"type": "error", "error_code": "server_at_capacity", "message": "full", "retry_after_ms": 400}

    async def talk(socket: websockets.ServerConnection) -> None:
        times.append(time.monotonic())
        await socket.recv()
        if len(times) in (1, 6):
            await socket.send('{"type":"pong"}')
            if len(times) == 6:
                await socket.wait_closed()
        elif len(times) == 2:
            await socket.send(json.dumps(told))
            await socket.close(1013)
        socket.transport.abort()

    async with fake(talk) as url, connect(url, "k") as yap:
        await until(lambda: yap._link.socket is not None and len(times) == 6)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert 0.1 <= waits[0] <= 0.4 and 0.4 <= waits[1] < 0.8
    assert 0.5 <= waits[2] <= 1.4 and 0.9 <= waits[3] <= 2.4 and 1.9 <= waits[4] <= 4.4


async def test_calls_fail_when_it_gives_up_and_later_ones_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the last one."""
    monkeypatch.setattr(links, "_FIRST_WAIT_S", 0.05)
    _, engines = chat_only()
    async with service(engines, DEPLOY_MODELS="chat") as running:
        port, opening = running.server.bound_port, connect(running.ws, KEY, give_up_s=0.3)
        yap = await opening.__aenter__()
    try:
        for _ in range(2):
            begun = time.monotonic()
            with pytest.raises((Refused, GoingAway)):
                async with asyncio.timeout(10):
                    await yap.ping()
            assert time.monotonic() - begun < 5
        _, engines = chat_only()
        async with service(engines, DEPLOY_MODELS="chat", PORT=port):
            async with asyncio.timeout(10):
                while True:
                    try:
                        async with yap.turn("hi") as turn:
                            assert (await turn.result()).text == "Hello there."
                        break
                    except YapTextError as error:
                        assert error.retryable
    finally:
        await opening.__aexit__(None, None, None)


async def test_a_call_that_is_not_waited_for_is_not_sent_later() -> None:
    """A user who gave up does not get a turn when the service is back."""
    _, engines = chat_only()
    async with service(engines, DEPLOY_MODELS="chat", MAX_CONCURRENT_CONNECTIONS=1) as running:
        async with connect(running.ws, KEY) as yap:
            assert yap._link.socket is not None
            yap._link.socket.transport.abort()
            await until(lambda: running.active == 0)
            async with running.connect() as other:  # takes the only slot
                await other.send('{"type":"ping"}')
                await other.recv()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await yap.turn("hi").begin()
                with pytest.raises(ServerAtCapacity):
                    async with connect(running.ws, KEY):
                        pytest.fail("the house is full")
            assert not (await yap.get_session()).known
