"""client/client.py, client/link.py: connecting, and what a newer or a strange server sends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import websockets
from conftest import service
from fakes import ScriptedEngine
from other_server import ACK, TURN, Talk, serving

from yaptext.client import (
    Ack,
    AuthenticationFailed,
    ConnectionLost,
    Done,
    Final,
    GoingAway,
    Refused,
    Token,
    Unreadable,
    connect,
)
from yaptext.client.errors import RECONNECTS, RECONNECTS_WHEN_NEEDED
from yaptext.engine.base import Engines


def saying(*frames: dict[str, Any], code: int = 1000) -> Talk:
    """Waits for a frame, sends the frames, then closes."""

    async def talk(socket: websockets.ServerConnection) -> None:
        await socket.recv()
        for frame in frames:
            await socket.send(json.dumps(frame))
        await socket.close(code)

    return talk


async def test_a_message_is_one_json_frame_and_the_key_is_in_a_header() -> None:
    """The key is not in the address, where logs would show it. A key that is not ASCII arrives as UTF-8."""
    seen: list[Any] = []

    async def talk(socket: websockets.ServerConnection) -> None:
        assert socket.request is not None
        seen.append((socket.request.path, socket.request.headers["X-API-Key"].encode("latin-1").decode()))
        seen.append(json.loads(await socket.recv()))

    async with serving(talk) as url, connect(url, "schlüssel", session_id="s") as yap:
        with pytest.raises(ConnectionLost):
            await yap.turn("naïve", note=None).begin()
    assert seen == [
        ("/ws", "schlüssel"),
        {"type": "start", "session_id": "s", "user_utterance": "naïve", "note": None},
    ]


async def test_types_and_fields_of_a_newer_service_are_ignored() -> None:
    """An unknown type, also between the frames of a turn, and unknown fields of known ones."""
    newer = {"type": "mood", "turn": 1, "mood": "fine"}
    frames = [part for frame in TURN for part in (newer, {**frame, "new": {"a": [1]}})]
    async with serving(saying(*frames)) as url, connect(url, "k", reconnect=False) as yap:
        async with yap.turn("hi") as turn:
            assert [type(event) for event in [event async for event in turn]] == [Ack, Token, Final, Done]
        assert (turn.text, turn.over, turn.decision, turn.usage, turn.timings) == ("a", True, None, None, None)


@pytest.mark.parametrize("frame", [{"type": "token"}, {"type": "token", "text": 1, "turn": 1}, {}, [1]])
async def test_a_frame_that_cannot_be_read_ends_the_turn_with_an_error(frame: Any) -> None:
    """It does not hang, and it is not tried again."""
    async with serving(saying(ACK, frame)) as url, connect(url, "k") as yap:
        async with yap.turn("hi") as turn:
            with pytest.raises(Unreadable) as raised:
                await turn.result()
    assert not raised.value.retryable


async def test_an_event_cannot_be_changed() -> None:
    """Events are shared by whatever reads them."""
    async with serving(saying(*TURN)) as url, connect(url, "k", reconnect=False) as yap:
        async with yap.turn("hi") as turn:
            async for event in turn:
                with pytest.raises(AttributeError):
                    event.turn = 7  # type: ignore[misc]


@pytest.mark.parametrize("code", [1000, 1008, 1009, 1011, 1012, 1013, 4000, 4001, 4321])
async def test_a_socket_that_closes_in_a_turn_is_an_error_with_its_code(code: int) -> None:
    """Whether a new socket is opened or not, the turn has no end to show. A retry helps where the client reconnects,
    and after an idle socket."""
    async with serving(saying(*TURN[:2], code=code)) as url, connect(url, "k", reconnect=False) as yap:
        events = []
        with pytest.raises(ConnectionLost, match="the service closed the connection") as raised:
            async with yap.turn("hi") as turn:
                async for event in turn:
                    events.append(event)
        assert [type(event) for event in events] == [Ack, Token]
        assert raised.value.close_code == code
        assert raised.value.retryable == (code in RECONNECTS or code == 4000)
        with pytest.raises(ConnectionLost):
            await yap.ping()


def test_every_close_code_of_the_service_is_decided() -> None:
    """The codes of yaptext/wire/README.md: reconnect, reconnect when needed, or never."""
    assert {1011, 1012, 1013} <= RECONNECTS and not RECONNECTS & RECONNECTS_WHEN_NEEDED
    assert {1009, 4000, 4001} == RECONNECTS_WHEN_NEEDED
    assert not {1000, 1007, 1008} & (RECONNECTS | RECONNECTS_WHEN_NEEDED)


async def test_an_address_where_nothing_listens_is_named() -> None:
    """A retry may help."""
    async with serving(saying()) as url:
        pass
    with pytest.raises(Refused, match=f"^cannot connect to {url}: ") as raised:
        async with connect(f"{url}?ticket=secret", "k"):
            pytest.fail("nothing listens")
    assert raised.value.retryable and "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1/ws", "nonsense", ""])
async def test_what_is_no_address_is_named(url: str) -> None:
    """A wrong --url is one line."""
    with pytest.raises(Refused, match=f"^cannot connect to {url}: ") as raised:
        async with connect(url, "k"):
            pytest.fail("that is no address")
    assert not raised.value.retryable


@pytest.mark.parametrize(
    ("answer", "retryable", "after"),
    [
        ("404 Not Found\r\nContent-Length: 0\r\n", False, None),
        ("503 Service Unavailable\r\nRetry-After: 7\r\nContent-Length: 0\r\n", True, 7000),
        ("429 Too Many Requests\r\nRetry-After: Mon\r\nContent-Length: 0\r\n", True, None),
    ],
)
async def test_a_server_that_is_no_websocket_server_is_named(answer: str, retryable: bool, after: int | None) -> None:
    """Something else may listen there, or a proxy answers for a service that is away."""

    async def other(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {answer}\r\n".encode())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(other, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
        with pytest.raises(Refused, match=f"^cannot connect to {url}: ") as raised:
            async with connect(url, "k"):
                pytest.fail("that is no service")
    assert (raised.value.retryable, raised.value.retry_after_ms) == (retryable, after)


async def test_a_service_behind_a_proxy_that_stops_says_when_to_come_back() -> None:
    """It answers the handshake with 503 and the error as JSON."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        async with connect(running.ws, "yap_token"):
            running.server.begin_drain()
            await asyncio.sleep(0)
            with pytest.raises(GoingAway) as raised:
                async with connect(running.ws, "yap_token", additional_headers={"Via": "1.1 proxy"}):
                    pytest.fail("it stops")
    assert raised.value.retryable and raised.value.retry_after_ms


async def test_a_wrong_key_is_refused_by_connect() -> None:
    """Not by the first turn: what to correct is said where it is given."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        with pytest.raises(AuthenticationFailed):
            async with connect(running.ws, "wrong"):
                pytest.fail("a wrong key")
