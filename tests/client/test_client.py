"""client/client.py: connecting, reading one turn, and what is said where that fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import websockets

from yaptext.client.client import Refused, connect

Talk = Callable[[websockets.ServerConnection], Awaitable[None]]
ACK, TOKEN, FINAL = {"type": "ack", "turn": 1}, {"type": "token", "text": "a"}, {"type": "final"}
DONE, ERROR = {"type": "done", "turn": 1}, {"type": "error", "error_code": "engine_failed"}


@asynccontextmanager
async def serving(talk: Talk) -> AsyncIterator[str]:
    """The address of a server that talks so with whoever connects."""
    async with websockets.serve(talk, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"


def saying(*frames: dict[str, Any], code: int = 1000) -> Talk:
    """Sends the frames, then closes."""

    async def talk(socket: websockets.ServerConnection) -> None:
        for frame in frames:
            await socket.send(json.dumps(frame))
        await socket.close(code)

    return talk


async def test_a_message_is_one_json_frame_and_the_key_is_in_a_header() -> None:
    """The key does not stand in the address, where logs would find it."""
    seen: list[Any] = []

    async def talk(socket: websockets.ServerConnection) -> None:
        assert socket.request is not None
        seen.append((socket.request.path, socket.request.headers["X-API-Key"]))
        seen.append(json.loads(await socket.recv()))

    async with serving(talk) as url:
        async with connect(url, "secret") as client:
            await client.send("start", session_id="s", user_utterance="naïve")
            assert [frame async for frame in client.frames()] == []
    assert seen == [("/ws", "secret"), {"type": "start", "session_id": "s", "user_utterance": "naïve"}]


@pytest.mark.parametrize("last", [DONE, ERROR])
async def test_a_turn_ends_with_done_or_error(last: dict[str, Any]) -> None:
    """What follows belongs to the next turn."""
    async with serving(saying(ACK, TOKEN, FINAL, last, ACK, DONE)) as url, connect(url, "k") as client:
        assert [frame async for frame in client.turn()] == [ACK, TOKEN, FINAL, last]
        assert [frame async for frame in client.turn()] == [ACK, DONE]


@pytest.mark.parametrize("code", [1000, 1011, 1013])
async def test_a_socket_that_closes_in_a_turn_is_told(code: int) -> None:
    """Whether it was closed in good order or not, the turn has no end to show."""
    async with serving(saying(ACK, TOKEN, code=code)) as url, connect(url, "k") as client:
        frames = []
        with pytest.raises(Refused, match="the service closed the connection"):
            async for frame in client.turn():
                frames.append(frame)
        assert frames == [ACK, TOKEN]


async def test_sending_on_a_closed_connection_is_told() -> None:
    """Who was silent for so long that the service closed the socket reads a line, not a traceback."""
    closed = asyncio.Event()

    async def talk(socket: websockets.ServerConnection) -> None:
        await socket.close(4000, "idle")
        closed.set()

    async with serving(talk) as url, connect(url, "k") as client:
        await closed.wait()
        with pytest.raises(Refused, match="the service closed the connection"):
            await client.send("start", session_id="s", user_utterance="hello?")


async def test_an_address_where_nobody_listens_is_named() -> None:
    """The line says where it was tried."""
    async with serving(saying()) as url:
        pass
    with pytest.raises(Refused, match=f"^cannot connect to {url}: "):
        async with connect(url, "k"):
            pytest.fail("nobody listens")


@pytest.mark.parametrize("url", ["http://127.0.0.1/ws", "nonsense", ""])
async def test_what_is_no_address_is_named(url: str) -> None:
    """A wrong --url is one line."""
    with pytest.raises(Refused, match=f"^cannot connect to {url}: "):
        async with connect(url, "k"):
            pytest.fail("that is no address")


async def test_a_server_that_is_no_websocket_server_is_named() -> None:
    """Something else may listen there."""

    async def other(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(other, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
        with pytest.raises(Refused, match=f"^cannot connect to {url}: "):
            async with connect(url, "k"):
                pytest.fail("that is no service")
