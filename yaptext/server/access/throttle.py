"""Rates: so many acts of a key a minute, so many wrong keys of an address."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable

from cachetools import LRUCache

from yaptext.server.access.caller import parsed

Clock = Callable[[], float]


class Bucket:
    """`per_minute` at once, then as many a minute, evenly."""

    __slots__ = ("_at", "_clock", "_left", "per_minute")

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute, self._left = per_minute, float(per_minute)
        self._clock, self._at = clock, clock()

    def wait_s(self) -> float:
        """Seconds until one may be taken; 0: now."""
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        missing = 1 - self._left
        return missing * 60 / self.per_minute if missing > 1e-6 else 0.0

    def take(self) -> float:
        """Takes one, or returns the seconds until there is one."""
        wait_s = self.wait_s()
        if not wait_s:
            self._left -= 1
        return wait_s


class Throttle:
    """Failed attempts by address; `max_addresses` are remembered, those seen latest. With `per_minute` 0 it is off."""

    def __init__(self, per_minute: int, *, max_addresses: int = 10_000, clock: Clock = time.monotonic) -> None:
        self._buckets: LRUCache[str, Bucket] = LRUCache(max_addresses)
        self._per_minute, self._clock = per_minute, clock

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, address: str) -> float:
        """Seconds until the address may fail again; 0: now."""
        bucket = self._buckets.get(network(address))
        return bucket.wait_s() if bucket else 0.0

    def failed(self, address: str) -> None:
        """Counts a failure."""
        if self._per_minute:
            self._buckets.setdefault(network(address), Bucket(self._per_minute, self._clock)).take()


def network(address: str) -> str:
    """Whose address it is: an IPv6 host has a /64 to choose from."""
    ip = parsed(address)
    if ip is None:
        return address[:64]
    return str(ip if ip.version == 4 else ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
