"""A session: what is remembered of one user between turns."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from sys import getsizeof
from typing import TYPE_CHECKING, Protocol

from yaptext.dialogue.heard import Heard
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.tool_rounds import Asked
from yaptext.dialogue.transcript import Transcript
from yaptext.store.base import SessionKey

if TYPE_CHECKING:
    from yaptext.dialogue.tools import ToolSet

_SESSION_BYTES = 2_000


class Running(Protocol):
    """The turn that runs in a session. It is `over` once its last frame is out; the engine may take until `finished`
    to let go. It waits for those in `waits_for`."""

    number: int
    finished: asyncio.Event

    @property
    def over(self) -> bool: ...

    @property
    def session(self) -> Session: ...

    @property
    def waits_for(self) -> Sequence[Running]: ...

    def cancel(self, heard: Heard | None = None) -> None: ...


class Session:
    """One user of one key. It outlives its sockets; two sockets may share it."""

    __slots__ = (
        "asked", "beside", "bytes", "current", "forgotten", "key", "persona", "seed", "tools", "transcript", "turns",
        "used_at", "warming",
    )  # fmt: skip

    def __init__(self, key: SessionKey) -> None:
        self.key = key
        self.persona = Persona()
        self.seed = secrets.randbits(31)
        self.tools: ToolSet | None = None
        self.transcript = Transcript()
        self.turns = 0
        self.current: Running | None = None
        self.beside: set[Session] = set()
        """Those of requests that run beside each other in its name."""
        self.asked: Asked | None = None
        """Calls whose results the last turn waits for."""
        self.warming: asyncio.Task[None] | None = None
        self.forgotten = False
        self.used_at = 0.0
        self.bytes = _SESSION_BYTES
        """As it was weighed last."""

    @property
    def key_name(self) -> str:
        return self.key[0]

    @property
    def session_id(self) -> str:
        return self.key[1]

    @property
    def running(self) -> list[Running]:
        """Its turns that run or wait."""
        return [each.current for each in (self, *self.beside) if each.current is not None]

    @property
    def in_use(self) -> bool:
        return self.current is not None or bool(self.beside)

    def weigh(self) -> int:
        """What it takes in memory, roughly, and no less; tools count in full in each session that shares them."""
        tools = self.tools.bytes if self.tools is not None else 0
        return _SESSION_BYTES + 2 * getsizeof(self.persona.text or "") + tools + self.transcript.bytes
