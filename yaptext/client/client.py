"""A small client of `/ws`: connect, send, and read one turn's frames."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import websockets

from yaptext.errors import YapError


class Refused(YapError):
    """The service cannot be reached, or it closed the door with an error frame."""


class Client:
    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket

    async def send(self, type: str, **fields: Any) -> None:
        try:
            await self._socket.send(json.dumps({"type": type, **fields}))
        except websockets.ConnectionClosed as error:
            raise Refused(f"the service closed the connection: {error}") from None

    async def frames(self) -> AsyncIterator[dict[str, Any]]:
        """Frames until the socket closes."""
        try:
            async for frame in self._socket:
                yield json.loads(frame)
        except websockets.ConnectionClosedError as error:
            raise Refused(f"the service closed the connection: {error}") from None

    async def turn(self) -> AsyncIterator[dict[str, Any]]:
        """The frames of one turn, its `done` or `error` last. Raises `Refused` where the socket closes first."""
        async for frame in self.frames():
            yield frame
            if frame["type"] in ("done", "error"):
                return
        raise Refused("the service closed the connection")


@asynccontextmanager
async def connect(url: str, key: str) -> AsyncIterator[Client]:
    """A conversation at `url`. The key travels in a header, not in the address. Raises `Refused`."""
    try:
        async with websockets.connect(url, additional_headers={"X-API-Key": key}, proxy=None) as socket:
            yield Client(socket)
    except (OSError, websockets.InvalidHandshake, websockets.InvalidURI) as error:
        raise Refused(f"cannot connect to {url}: {error}") from None
