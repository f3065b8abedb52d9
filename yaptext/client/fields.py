"""What a caller may say, and the frames that are made of it.

An absent field keeps the session's value; None clears it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from yaptext.client.errors import BadMessage
from yaptext.errors import WireError
from yaptext.wire.frames import HistoryItem, SamplingFields
from yaptext.wire.reading import decode

History = str | Sequence[HistoryItem | Mapping[str, Any]]
"""A text whose lines begin with User: and Assistant:, or messages with `role`, `content` and perhaps `name`."""
Schema = Mapping[str, Any]
Tools = Mapping[str, Callable[..., Any]] | Sequence[Schema | tuple[Schema, Callable[..., Any]]]
"""Callables for the service's own tools by name, or the tools of this session, each with or without its callable."""


class Persona(TypedDict, total=False):
    persona_text: str | None
    persona_style: str | None
    assistant_gender: str | None
    user_identity: str | None


class TurnFields(Persona, total=False):
    """`heard_text` or `heard_chars`: how much of the last reply was heard. `note` is for this turn only."""

    history: History | None
    tools: Tools | None
    await_tools: bool | None
    sampling: SamplingFields | Mapping[str, Any] | None
    heard_chars: int | None
    heard_text: str | None
    speakable: bool | None
    note: str | None


class Warming(Persona, total=False):
    history: History


def check_names(fields: Mapping[str, Any], known: type) -> None:
    """Raises `TypeError` for a misspelt field, which the service would ignore."""
    names = {name for cls in known.__mro__ for name in getattr(cls, "__annotations__", {})}
    if unknown := sorted(fields.keys() - names):
        raise TypeError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(names))}")


def frame(type: str, **fields: Any) -> str:
    """A frame as text. Raises `BadMessage` for what the service would refuse to read."""
    if isinstance(fields.get("history"), str):
        fields["history_text"] = fields.pop("history")
    try:
        data = msgspec.json.encode({"type": type, **fields})
    except UnicodeEncodeError:
        raise BadMessage("A text holds half a character (a lone surrogate), which UTF-8 cannot say.") from None
    try:
        decode(data)
    except WireError as error:
        raise BadMessage(error.message) from None
    return data.decode()
