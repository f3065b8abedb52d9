"""Rates: so many a minute, for a key and for an address that keeps giving wrong ones."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

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
    """Failed attempts by address, of which the `max_addresses` latest are remembered. With `per_minute` 0 it is off."""

    def __init__(self, per_minute: int, *, max_addresses: int = 10_000, clock: Clock = time.monotonic) -> None:
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._per_minute, self._max, self._clock = per_minute, max_addresses, clock

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, address: str) -> float:
        """Seconds until the address may fail again; 0: now."""
        bucket = self._buckets.get(network(address))
        return bucket.wait_s() if bucket else 0.0

    def failed(self, address: str) -> None:
        """Counts a failure."""
        if self._per_minute:
            name = network(address)
            self._buckets.setdefault(name, Bucket(self._per_minute, self._clock)).take()
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._max:
                self._buckets.popitem(last=False)


def network(address: str) -> str:
    """Whose address it is: an IPv6 host has a /64 to choose from, and an IPv4 one may be written as IPv6."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]  # a socket without addresses, or what a trusted proxy wrote
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
    return str(ip)
