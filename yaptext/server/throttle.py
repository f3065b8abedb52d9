"""Rates: so many a minute, for a key, for an address that keeps giving wrong ones, and for lines of the log."""

from __future__ import annotations

import asyncio
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


class Sparing:
    """Lines of the log that anybody can cause: `per_minute` of an event with the same fields, of which there are few,
    then one with `held_back`, how many more there were in that minute."""

    def __init__(self, tell: Callable[..., object], per_minute: int = 10) -> None:
        self._tell, self._per_minute = tell, per_minute
        self._counts: dict[object, int] = {}

    def tell(self, event: str, **fields: str | int) -> None:
        kind = event, *fields.values()
        count = self._counts.get(kind, 0)
        if not count:
            asyncio.get_running_loop().call_later(60, self._end_minute, kind, event, fields)
        self._counts[kind] = count + 1
        if count < self._per_minute:
            self._tell(event, **fields)

    def _end_minute(self, kind: object, event: str, fields: dict[str, str | int]) -> None:
        held_back = self._counts.pop(kind) - self._per_minute
        if held_back > 0:
            self._tell(event, **fields, held_back=held_back)


def network(address: str) -> str:
    """Whose address it is: an IPv6 host has a /64 to choose from, and an IPv4 one may be written as IPv6."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]  # a socket without addresses, or what a trusted proxy wrote
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
    return str(ip)
