"""Transcripts that a client had warmed, kept with their token ids until the turn that they were warmed for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yaptext.dialogue.transcript import Message

_MOST, _MOST_CHARS = 64, 1_000_000
"""Transcripts and characters of one key."""


@dataclass(frozen=True, slots=True)
class Warm:
    """A transcript that was warmed, with its token ids, and by which session."""

    messages: list[Message]
    session_id: str | None


class WarmedTranscripts:
    """Transcripts that were warmed, by name of the key and text, until the turn that they were warmed for. Those of one
    key make no room for those of another."""

    def __init__(self) -> None:
        self._by_key: dict[str, dict[str, Warm]] = {}

    def of(self, key_name: str) -> list[str]:
        """Their texts, oldest first."""
        return list(self._by_key.get(key_name, ()))

    def keep(self, key_name: str, text: str, warm: Warm) -> None:
        """The oldest go: of a key in its bounds, and the key's own."""
        kept = self._by_key.setdefault(key_name, {})
        kept.pop(text, None)
        kept[text] = warm
        while len(kept) > _MOST or (len(kept) > 1 and sum(map(len, kept)) > _MOST_CHARS):
            del kept[next(iter(kept))]

    def take(self, key_name: str, text: str) -> Sequence[Message]:
        """Its messages, which are then no longer kept here; none for a text that was not warmed."""
        kept = self._by_key.get(key_name, {})
        found = kept.pop(text, None)
        if not kept:
            self._by_key.pop(key_name, None)
        return () if found is None else found.messages

    def forget(self, key_name: str, session_id: str) -> bool:
        """Drops what a session warmed; whether there was any."""
        kept = self._by_key.get(key_name, {})
        of_session = [text for text, warm in kept.items() if warm.session_id == session_id]
        for text in of_session:
            del kept[text]
        return bool(of_session)
