"""A server that speaks the protocol as a test wants it to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import websockets

Talk = Callable[[websockets.ServerConnection], Awaitable[None]]
ACK = {
    "type": "ack",
    "for": "start",
    "ok": True,
    "session_id": "s",
    "turn": 1,
    "seed": 1,
    "now": "2026-11-30T00:00:00+00:00",
    "assistant_gender": None,
    "persona_style": None,
    "persona_text_override": False,
    "models": {"chat": "a", "tool": None},
}
TURN = [
    ACK,
    {"type": "token", "text": "a", "turn": 1},
    {"type": "final", "normalized_text": "a", "turn": 1},
    {"type": "done", "turn": 1},
]


@asynccontextmanager
async def serving(talk: Talk) -> AsyncIterator[str]:
    """The address of a server that answers the client's first ping, then talks so."""

    async def answering(socket: websockets.ServerConnection) -> None:
        assert json.loads(await socket.recv()) == {"type": "ping"}
        await socket.send('{"type":"pong"}')
        await talk(socket)

    async with websockets.serve(answering, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
