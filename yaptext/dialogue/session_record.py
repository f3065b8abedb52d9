"""A session as the record that a store keeps of it."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache

import msgspec

from yaptext.dialogue.persona import Persona, styles
from yaptext.dialogue.session import Session
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import Message
from yaptext.errors import BadMessage
from yaptext.store.base import PersonaRecord, SessionRecord


def record_of(session: Session) -> SessionRecord:
    who = session.persona
    persona = PersonaRecord(who.style, who.gender, who.identity, who.text)
    said = [(message.speaker, message.text) for message in session.transcript.messages]
    tools = session.tools.given if session.tools is not None else None
    return SessionRecord(session.key, persona, session.seed, session.turns, said, tools)


def restored(record: SessionRecord) -> Session:
    """The session of a record, less a style or tools that this version does not know."""
    session, who = Session(record.key), record.persona
    session.persona = Persona(who.style if who.style in styles() else None, who.gender, who.identity, who.text)
    session.seed, session.turns = record.seed, record.turns
    session.transcript.messages = [Message(speaker, text) for speaker, text in record.messages]
    with suppress(BadMessage):
        session.tools = None if record.tools is None else _tool_set(msgspec.json.encode(record.tools))
    return session


@lru_cache
def _tool_set(tools: bytes) -> ToolSet:
    """Thousands of sessions may have the same few lists."""
    return ToolSet(msgspec.json.decode(tools))
