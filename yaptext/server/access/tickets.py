"""Tickets: what a browser may know instead of a key. Each opens one socket, soon."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict

from yaptext.server.access.keyfile import hash_of
from yaptext.server.access.throttle import Clock

TTL_S = 60
PER_MINUTE = 600
"""Of one key. So a key has at most twice as many tickets that wait: what they take is bounded."""


class Tickets:
    """Random numbers that this process remembers until they are used or expire: a restart makes all of them void.

    No `TTLCache`: its `pop` reads the clock twice, and raises if a ticket expires in between."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._waiting: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._clock = clock

    def __len__(self) -> int:
        return len(self._waiting)

    def issue(self, key_hash: bytes) -> str:
        """A ticket for whom this key stands."""
        now = self._clock()
        while self._waiting and next(iter(self._waiting.values()))[1] <= now:
            self._waiting.popitem(last=False)
        ticket = secrets.token_urlsafe(32)
        self._waiting[hash_of(ticket.encode())] = (key_hash, now + TTL_S)
        return ticket

    def redeem(self, ticket: bytes) -> bytes | None:
        """The hash of the key it was issued to; None for one that is forged, used or expired."""
        key_hash, expires = self._waiting.pop(hash_of(ticket), (None, 0.0))
        return key_hash if self._clock() < expires else None
