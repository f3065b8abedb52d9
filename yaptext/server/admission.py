"""Slots for sockets: how many conversations the deployment carries at once, by what runs out first."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import UNSET

from yaptext.engine.base import Load
from yaptext.errors import ServerAtCapacity
from yaptext.server.access.accounts import Account
from yaptext.server.slots import Holder, Slots
from yaptext.wire.frames import Capacity

_RETRY_AFTER_MS, _FEW = 2000, 8
"""Used until enough connections have ended to know how often that happens."""
_RETRY_BOUNDS_MS, _JITTER = (250, 30_000), 0.25


class Admission:
    """At most `limit` connections; beyond `floor`, as many as the KV cache holds at the measured size of a session;
    and no more while prompts wait for longer than `max_backlog_ms` (0: however long). A slot is a context manager, so
    that it cannot leak."""

    def __init__(
        self,
        limit: int,
        *,
        floor: int = 1,
        max_backlog_ms: float = 0,
        load: Callable[[], Load] = lambda: Load(0, 0.0, 0),
        cache_tokens: float = 0,
        session_tokens: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cache_tokens` is what the KV cache holds, `session_tokens` what one session keeps there; 0 is unknown."""
        self.limit, self._floor, self._max_backlog_ms = limit, floor, max_backlog_ms
        self._load, self._cache_tokens, self._session_tokens = load, cache_tokens, session_tokens
        self._clock = clock
        self._ended: deque[float] = deque([clock()], maxlen=32)
        self.slots = Slots()

    @property
    def fitting(self) -> int:
        """How many connections there may be now."""
        tokens = self._session_tokens()
        if not (tokens and self._cache_tokens):
            return self.limit
        return min(self.limit, max(self._floor, int(self._cache_tokens / tokens)))

    @property
    def capacity(self) -> Capacity:
        active, most = len(self.slots), self.fitting
        full = active >= most
        waiting = bool(active and self._max_backlog_ms and self._load().backlog_ms > self._max_backlog_ms)
        return Capacity(
            active=active,
            max=most,
            available=0 if waiting else max(0, most - active),
            at_capacity=full or waiting,
            limited_by="prefill" if waiting and not full else "kv_cache" if full and most < self.limit else UNSET,
        )

    @contextmanager
    def slot(self, account: Account, holder: Holder) -> Iterator[None]:
        """Holds a place. Raises `RateLimited` if the key has as many as it may, `ServerAtCapacity` if there is none."""
        account.admit(len(self.slots.of(account)))
        capacity = self.capacity
        if capacity.at_capacity:
            raise ServerAtCapacity("Server is at capacity.", retry_after_ms=self._retry_after_ms(capacity))
        try:
            with self.slots.held(account, holder):
                yield
        finally:
            self._ended.append(self._clock())

    def _retry_after_ms(self, capacity: Capacity) -> int:
        """Until the backlog is worked off, or as long as it takes on average until a connection ends."""
        if capacity.limited_by == "prefill":
            wait_ms = self._load().backlog_ms
        elif len(self._ended) > _FEW:
            wait_ms = 1000 * (self._clock() - self._ended[0]) / (len(self._ended) - 1)
        else:
            wait_ms = _RETRY_AFTER_MS
        least, most = _RETRY_BOUNDS_MS
        return round(min(most, max(least, wait_ms * random.uniform(1 - _JITTER, 1 + _JITTER))))
