"""A client's frame before a turn is made of it: no more of its texts than is ever looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec import UnsetType

from yaptext.dialogue import transcript
from yaptext.dialogue.runtime import Runtime
from yaptext.errors import BadMessage, TextTooLong
from yaptext.wire.frames import HistoryItem, PersonaFields, Start, WarmHistory

_ITEM_BYTES, _NAME_CHARS = 64, 64
_HEARD_CHARS = 65_536

_Frame = TypeVar("_Frame", bound=PersonaFields)


@dataclass(frozen=True, slots=True)
class Told:
    """A history as a client sent it: `text` finds it again, `size` is its length in characters."""

    messages: list[transcript.Message]
    text: str

    @property
    def size(self) -> int:
        return len(self.text)


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


def told(runtime: Runtime, frame: Start | WarmHistory) -> Told | None:
    """The history of a bounded frame, in whatever form; None if it has none."""
    text, items = frame.history_text, frame.history
    if isinstance(items, list):
        return Told(transcript.of_items(items), msgspec.json.encode(items).decode())
    if isinstance(text, str):
        messages = transcript.parse(text)
        sizes = [max(len(message.text), _ITEM_BYTES) for message in messages]
        return Told(messages[transcript.keep_recent(sizes, runtime.history_bytes) :], text)
    return None if isinstance(text, UnsetType) and isinstance(items, UnsetType) else Told([], "")


def _latest(items: list[HistoryItem], max_bytes: int) -> list[HistoryItem]:
    """The end of a long history, in steps, as of one that is a text. An item counts as no fewer than 64 bytes."""
    if len(items) * _ITEM_BYTES > 2 * max_bytes:
        items = items[-(max_bytes // _ITEM_BYTES) :]
    sizes = [max(len(item.content.encode(errors="replace")), _ITEM_BYTES) + len(item.name or "") for item in items]
    if items and sizes[-1] > max_bytes:
        last = items[-1]
        return [HistoryItem(last.role, last.content[-max_bytes // 4 :], (last.name or "")[:_NAME_CHARS] or None)]
    return items[transcript.keep_recent(sizes, max_bytes) :]
