"""What is kept of one session, as a row of the session file holds it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

import msgspec

from yaptext.dialogue.persona import Persona, styles
from yaptext.dialogue.session import Session
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import Message, Speaker
from yaptext.errors import BadMessage

_VERSION = 1
"""Of a body, to be raised when its form changes: one that tells none is of version 1."""


class OtherVersion(Exception):
    """A body in a form that this version cannot write back whole."""


class _Form(msgspec.Struct, frozen=True):
    """As much of a body as every version reads."""

    version: int = 1


class SessionRecord(msgspec.Struct, frozen=True):
    """What is kept of one session."""

    key: tuple[str, str]
    persona: Persona
    seed: int
    turns: int
    messages: list[tuple[Speaker, str]]
    tools: Sequence[dict[str, Any]] | None
    version: int = _VERSION

    @classmethod
    def of(cls, session: Session) -> SessionRecord:
        said = [(message.speaker, message.text) for message in session.transcript.messages]
        tools = session.tools.given if session.tools is not None else None
        return cls(session.key, session.persona, session.seed, session.turns, said, tools)

    def after(self, earlier: SessionRecord) -> SessionRecord:
        """Both as one: the transcript of `earlier`, then this one's; persona and tools are this one's if it has any."""
        return msgspec.structs.replace(
            self,
            persona=earlier.persona if self.persona == Persona() else self.persona,
            turns=earlier.turns + self.turns,
            messages=[*earlier.messages, *self.messages],
            tools=earlier.tools if self.tools is None else self.tools,
        )

    def fill(self, session: Session) -> None:
        """Makes a new session what the kept one was, less a style or tools that this version does not know."""
        known = self.persona.style in styles()
        session.persona = self.persona if known else replace(self.persona, style=None)
        session.seed, session.turns = self.seed, self.turns
        session.transcript.messages = [Message(speaker, text) for speaker, text in self.messages]
        with suppress(BadMessage):
            session.tools = None if self.tools is None else _tool_set(msgspec.json.encode(self.tools))

    @classmethod
    def decode(cls, body: bytes) -> SessionRecord:
        """Raises `OtherVersion` for a body in another form, and what the decoder raises for one that is damaged."""
        try:
            if msgspec.json.decode(body, type=_Form).version > _VERSION:
                raise OtherVersion
            return msgspec.json.decode(body, type=cls)
        except msgspec.ValidationError as error:  # whole JSON, with other fields
            raise OtherVersion from error


@lru_cache
def _tool_set(tools: bytes) -> ToolSet:
    """Thousands of sessions may have the same few lists."""
    return ToolSet(msgspec.json.decode(tools))
