"""Responses that a client continues by their id, with the conversation before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachetools import TTLCache

_TTL_S = 3600.0
_BYTES = 32 * 2**20
"""Of one key."""
_LEAST_BYTES = 1_000


@dataclass(frozen=True, slots=True)
class Kept:
    """A conversation up to the end of a response. `messages` are of the door's own kind, `bytes` their size."""

    session_id: str | None
    messages: tuple[Any, ...]
    bytes: int


class KeptResponses:
    """By key and id, each for an hour after it was made. Over the bound of a key its least used go. Responses of one
    key make no room for those of another, and are not found by it."""

    def __init__(self, most_bytes: int = _BYTES, ttl_s: float = _TTL_S) -> None:
        self._most_bytes, self._ttl_s = most_bytes, ttl_s
        self._by_key: dict[str, TTLCache[str, Kept]] = {}

    def find(self, key_name: str, response_id: str) -> Kept | None:
        of_key = self._by_key.get(key_name)
        return None if of_key is None else of_key.get(response_id)

    def keep(self, key_name: str, response_id: str, kept: Kept) -> None:
        """One that is over the bound by itself is not kept."""
        for name, others in list(self._by_key.items()):
            others.expire()
            if not others:
                del self._by_key[name]
        if key_name not in self._by_key:
            self._by_key[key_name] = TTLCache(self._most_bytes, self._ttl_s, getsizeof=_size)
        if _size(kept) <= self._most_bytes:
            self._by_key[key_name][response_id] = kept

    def forget(self, key_name: str, session_id: str) -> bool:
        """Drops those of a session; whether there was any."""
        of_key = self._by_key.get(key_name)
        of_session = [id for id, kept in of_key.items() if kept.session_id == session_id] if of_key else []
        for response_id in of_session:
            self._by_key[key_name].pop(response_id, None)
        return bool(of_session)


def _size(kept: Kept) -> int:
    return kept.bytes + _LEAST_BYTES
