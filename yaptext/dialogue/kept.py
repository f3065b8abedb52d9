"""Responses that a client continues by their id, with the conversation before them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from cachetools import TTLCache

_TTL_S = 3600.0
_BYTES, _ALL_BYTES = 128 * 2**20, 512 * 2**20
"""Limits of one key, and of all keys together."""
_SWEEP_S = 60.0
_LEAST_BYTES = 1_000


@dataclass(slots=True)
class Kept:
    """A conversation up to the end of a response. `messages` are of the door's own kind, `bytes` what they take in
    memory. `session_ids` are the sessions that they come from; once one of them is `forgotten`, what continues the
    conversation is not to be kept."""

    session_ids: frozenset[str]
    messages: tuple[Any, ...]
    bytes: int
    forgotten: bool = False


class KeptResponses:
    """Responses by key and id, each for an hour after it was made. Over the bound of a key its least used ones are
    dropped; over the bound of all, those of the key that has most. A key does not find the responses of another."""

    def __init__(
        self, most_bytes: int = _BYTES, all_bytes: int = _ALL_BYTES, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_bytes, self._all_bytes, self._clock = most_bytes, all_bytes, clock
        self._swept_at = clock()
        self._by_key: dict[str, TTLCache[str, Kept]] = {}
        self._beside: WeakSet[KeptResponses] = WeakSet()

    def beside(self, most_bytes: int) -> KeptResponses:
        """Responses of one socket alone. `forget` reaches them, too."""
        others = KeptResponses(most_bytes, clock=self._clock)
        self._beside.add(others)
        return others

    @property
    def keys(self) -> list[str]:
        """Names of keys that have any."""
        return list(self._by_key)

    @property
    def bytes(self) -> int:
        return sum(int(of_key.currsize) for of_key in self._by_key.values())

    def find(self, key_name: str, response_id: str) -> Kept | None:
        of_key = self._by_key.get(key_name)
        return None if of_key is None else of_key.get(response_id)

    def keep(self, key_name: str, response_id: str, kept: Kept) -> None:
        """A response that is over the bound by itself is not kept."""
        if self._clock() - self._swept_at > _SWEEP_S:
            self._sweep()
        if _size(kept) > self._most_bytes:
            return
        if key_name not in self._by_key:
            self._by_key[key_name] = TTLCache(self._most_bytes, _TTL_S, timer=self._clock, getsizeof=_size)
        self._by_key[key_name][response_id] = kept
        while self.bytes > self._all_bytes:
            max(self._by_key.values(), key=lambda of_key: of_key.currsize).popitem()

    def forget(self, key_name: str, session_id: str) -> bool:
        """Drops the responses of a session. True if there was any."""
        known = [others.forget(key_name, session_id) for others in list(self._beside)]
        of_key = self._by_key.get(key_name)
        of_session = [(id, kept) for id, kept in of_key.items() if session_id in kept.session_ids] if of_key else []
        for response_id, kept in of_session:
            kept.forgotten = True
            self._by_key[key_name].pop(response_id, None)
        return bool(of_session) or any(known)

    def _sweep(self) -> None:
        self._swept_at = self._clock()
        for name, of_key in list(self._by_key.items()):
            of_key.expire()
            if not of_key:
                del self._by_key[name]


def _size(kept: Kept) -> int:
    return kept.bytes + sum(map(len, kept.session_ids)) + _LEAST_BYTES
