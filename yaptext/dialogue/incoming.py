"""A client's frame before a turn is made of it: checked, with no more of its texts than is ever looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UnsetType

from yaptext.dialogue import transcript
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.request import History, Told, TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.errors import BadMessage, TextTooLong
from yaptext.wire.frames import HistoryItem, PersonaFields, Start, ToolResult, WarmHistory

_ITEM_BYTES, _NAME_CHARS = 64, 64
_HEARD_CHARS = 65_536

_Frame = TypeVar("_Frame", bound=PersonaFields)


def bounded(runtime: Runtime, frame: _Frame) -> _Frame:
    """The frame with no more of its texts than is ever looked at: it may wait, and what waits is kept. Raises
    `BadMessage`, and `TextTooLong` for a text that is over its limit in tokens, however few it takes."""
    limit = 16 * runtime.settings.persona_max_tokens
    if isinstance(frame.persona_text, str) and len(frame.persona_text) > limit:
        raise TextTooLong(f"persona_text is {len(frame.persona_text)} characters; limit is {limit}")
    changes: dict[str, Any] = {}
    if isinstance(frame, Start):
        if frame.note is not None and len(frame.note) > runtime.note_chars:
            raise TextTooLong(f"note is {len(frame.note)} characters; limit is {runtime.note_chars} - at $.note")
        if frame.user_utterance is not None:
            changes["user_utterance"] = frame.user_utterance[: runtime.utterance_chars]
        if frame.heard_text is not None:
            changes["heard_text"] = frame.heard_text[:_HEARD_CHARS]
    if isinstance(frame, Start | WarmHistory):
        text, items = frame.history_text, frame.history
        if isinstance(text, str) and isinstance(items, list):
            raise BadMessage("history and history_text say two things; send one - at $.history")
        if isinstance(text, str):
            changes["history_text"] = transcript.recent(text, runtime.history_bytes)
        if isinstance(items, list):
            changes["history"] = _latest(items, runtime.history_bytes)
    return msgspec.structs.replace(frame, **changes) if changes else frame


async def request_of(
    runtime: Runtime,
    frame: Start | ToolResult,
    key_name: str,
    charge: Callable[[Literal["tools"]], None],
    ignored: Sequence[str] = (),
) -> TurnRequest:
    """The request of a frame. Raises what it is refused for, before anything of it is kept. `charge` is called if the
    frame brings tools that have to be compiled."""
    if isinstance(frame, ToolResult):
        if await runtime.sessions.fetch((key_name, frame.session_id)) is None:
            raise BadMessage(f"Turn {frame.turn} waits for no tool results - at $.turn")
        return TurnRequest.of(frame, ignored)
    blank = frame.user_utterance is not None and not frame.user_utterance.strip()
    if blank and not runtime.settings.allow_empty_utterance:
        raise BadMessage(
            "user_utterance is blank; null lets the assistant speak (ALLOW_EMPTY_UTTERANCE) - at $.user_utterance"
        )
    frame = bounded(runtime, frame)
    found = await runtime.sessions.fetch((key_name, frame.session_id))
    persona = (found.persona if found else Persona()).merge(frame)
    if isinstance(frame.tools, list):
        await compiled(runtime, frame.tools, charge)
    if isinstance(frame.persona_text, str):
        await runtime.check_persona(persona)
    return TurnRequest.of(frame, ignored)


async def compiled(runtime: Runtime, tools: list[dict[str, Any]], charge: Callable[[Literal["tools"]], None]) -> None:
    """Returns when the grammar of the tools is made; `charge` is called if it was not. Raises `BadMessage`."""
    if runtime.tool_sets.known(tools) is None:
        charge("tools")
        await runtime.tool_sets.make(tools)


def told(runtime: Runtime, history: History) -> Told | None:
    """A bounded history, in whatever form; None if there is none."""
    if isinstance(history, Told):
        return history
    if isinstance(history, list):
        return Told(transcript.of_items(history), msgspec.json.encode(history).decode())
    if isinstance(history, str):
        messages = transcript.parse(history)
        sizes = [max(len(message.text), _ITEM_BYTES) for message in messages]
        return Told(messages[transcript.keep_recent(sizes, runtime.history_bytes) :], history)
    return None if isinstance(history, UnsetType) else Told([], "")


def _latest(items: list[HistoryItem], max_bytes: int) -> list[HistoryItem]:
    """The end of a long history, in steps, as of one that is a text. An item counts as no fewer than 64 bytes."""
    if len(items) * _ITEM_BYTES > 2 * max_bytes:
        items = items[-(max_bytes // _ITEM_BYTES) :]
    sizes = [max(len(item.content.encode(errors="replace")), _ITEM_BYTES) + len(item.name or "") for item in items]
    if items and sizes[-1] > max_bytes:
        last = items[-1]
        return [HistoryItem(last.role, last.content[-max_bytes // 4 :], (last.name or "")[:_NAME_CHARS] or None)]
    return items[transcript.keep_recent(sizes, max_bytes) :]
