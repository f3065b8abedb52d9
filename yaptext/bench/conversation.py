"""What every kind of server is to a scenario: a place to open conversations with, and one user's conversation."""

from __future__ import annotations

import asyncio
from typing import Protocol

from yaptext.bench.prompts import Story
from yaptext.bench.turn import Turn
from yaptext.client.errors import Refused


class Full(Refused):
    """The server has no place now. `code` is its error code, `retry_after_ms` the wait that it asks for."""

    def __init__(self, code: str, retry_after_ms: int | None) -> None:
        super().__init__(f"refused: {code}")
        self.code, self.retry_after_ms = code, retry_after_ms


class Conversation(Protocol):
    """One user's conversation. Calls may follow each other at once; nothing here waits for a reply."""

    gone: asyncio.Event
    """The server has closed the connection."""
    closed_code: int | None
    """The WebSocket close code it did so with."""
    strays: int
    """Frames that broke a rule of the protocol: of a turn that was over, or a `final` that is not its tokens."""

    async def open(self) -> None:
        """Connects and waits until the server shows that it has a place. Raises `Full`, `Refused`."""
        ...

    def meet(self, session: str, story: Story) -> None:
        """From the next turn on this is a session with that persona and history, unknown so far."""
        ...

    async def warm(self) -> None:
        """Has the server compute what the next turn of this session begins with. Raises `Refused`."""
        ...

    async def begin(self, utterance: str, *, part: str = "", again: bool = False) -> Turn:
        """Sends an utterance; a running turn is cut by it. `again` tells the history again, so that the prompt does
        not grow by what was said since."""
        ...

    def cancel(self) -> None:
        """Cuts the running turn."""
        ...

    def pause_reading(self) -> None:
        """From now on nothing is taken from the socket."""
        ...

    def resume_reading(self) -> None: ...

    def drop(self) -> None:
        """The connection is gone at once, without a goodbye. `open` may be called again."""
        ...

    async def close(self) -> None: ...


class Target(Protocol):
    """A server under measurement."""

    name: str
    url: str

    def conversation(self) -> Conversation: ...

    async def idle_streams(self) -> float:
        """How many requests the engines are busy with. Raises `Refused` where that cannot be known."""
        ...

    def close(self) -> None: ...
