"""A session as plain data, for whatever keeps it beyond the process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol

import msgspec

from yaptext.wire.frames import Gender, Identity

SessionKey = tuple[str, str]
"""(name of the API key, session_id): no key reaches another key's sessions."""
Speaker = Literal["user", "assistant", "note", "tool"]
_VERSION = 1
"""Of a body, incremented when its form changes: a body without one is of version 1."""


class OtherVersion(Exception):
    """A body in a form that this version cannot write back whole."""


class _Form(msgspec.Struct, frozen=True):
    """As much of a body as every version reads."""

    version: int = 1


class PersonaRecord(msgspec.Struct, frozen=True):
    style: str | None = None
    gender: Gender | None = None
    identity: Identity | None = None
    text: str | None = None


class SessionRecord(msgspec.Struct, frozen=True):
    """What is kept of one session."""

    key: SessionKey
    persona: PersonaRecord
    seed: int
    turns: int
    messages: list[tuple[Speaker, str]]
    tools: Sequence[dict[str, Any]] | None
    version: int = _VERSION

    def after(self, earlier: SessionRecord) -> SessionRecord:
        """Both as one: the transcript of `earlier`, then this one's; persona and tools are this one's if it has any."""
        return msgspec.structs.replace(
            self,
            persona=earlier.persona if self.persona == PersonaRecord() else self.persona,
            turns=earlier.turns + self.turns,
            messages=[*earlier.messages, *self.messages],
            tools=earlier.tools if self.tools is None else self.tools,
        )

    @classmethod
    def decode(cls, body: bytes) -> SessionRecord:
        """Raises `OtherVersion` for a body in another form, and what the decoder raises for one that is damaged."""
        try:
            if msgspec.json.decode(body, type=_Form).version > _VERSION:
                raise OtherVersion
            return msgspec.json.decode(body, type=cls)
        except msgspec.ValidationError as error:  # whole JSON, with other fields
            raise OtherVersion from error


class Store(Protocol):
    """`load` once, then `start`, `put`, `take` and `forget` at will, and `close`. Only `load` and `close` block; the
    others are called on the event loop."""

    @property
    def trouble(self) -> str | None:
        """Why a restart would not find what has changed since the last write, in a sentence."""

    def load(self) -> list[tuple[float, SessionRecord]]:
        """What was kept, each with the seconds since its last use, oldest first. Raises `SettingsError` and
        `StartError` for what a person has to put right; what may pass by itself is no error, and tried again."""

    def start(self) -> None:
        """Begins to write. After the engines' processes are there: they should not inherit a thread's state."""

    def put(self, used_at: float, record: SessionRecord) -> None:
        """Has the session written soon, as it is now."""

    def take(self, key: SessionKey) -> tuple[float, SessionRecord] | None:
        """A session that could only be read after `load`, and when it was last used. Asked for each key that is not in
        memory; there is an answer once."""

    def forget(self, key: SessionKey) -> Future[None]:
        """Has a session deleted; the future is done when nothing of it can be read any more."""

    def close(self, timeout_s: float) -> None:
        """Writes what waits, within the time."""
