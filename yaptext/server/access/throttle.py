"""Rates: so many a minute, for a key, for an address that keeps giving wrong ones, and for lines of the log."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

Clock = Callable[[], float]
Shown = Literal["whole", "truncated", "none"]
OTHERS = "others"
_Kind = tuple[str, str | None, tuple[tuple[str, str | int], ...]]
"""An event, its address as it is shown, and its fields."""


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
    """Lines of the log that anybody can cause. The first of an event, its fields and an address is told at once, then
    every `every_s` one line that says how many more there were (`count`).

    At most `most` are told apart at a time, so that many addresses fill neither the log nor the memory: what comes over
    that is told as of the address `others`. `how` is LOG_ADDRESS."""

    def __init__(
        self, tell: Callable[..., object], how: Shown = "truncated", *, every_s: float = 10.0, most: int = 32
    ) -> None:
        self._tell, self._how, self._every_s, self._most = tell, how, every_s, most
        self._counts: dict[_Kind, int] = {}
        """How many came since their last line."""

    def tell(self, event: str, address: str, **fields: str | int) -> None:
        """`fields` have few values: a client must not be able to choose them."""
        kind = event, shown(address, self._how), tuple(fields.items())
        if kind not in self._counts and len(self._counts) >= self._most:
            kind = event, OTHERS, tuple(fields.items())
        if kind in self._counts:
            self._counts[kind] += 1
        else:
            self._write(kind, 1)

    def _write(self, kind: _Kind, count: int) -> None:
        event, address, fields = kind
        self._counts[kind] = 0
        asyncio.get_running_loop().call_later(self._every_s, self._sum_up, kind)
        self._tell(event, **({} if address is None else {"address": address}), **dict(fields), count=count)

    def _sum_up(self, kind: _Kind) -> None:
        if count := self._counts.pop(kind):
            self._write(kind, count)


def shown(address: str, how: Shown) -> str | None:
    """The address as the log may have it; None: not at all."""
    if how == "none":
        return None
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"  # a socket without addresses, or what a trusted proxy wrote
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    if how == "whole":
        return str(ip)
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False))


def network(address: str) -> str:
    """Whose address it is: an IPv6 host has a /64 to choose from, and an IPv4 one may be written as IPv6."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]  # a socket without addresses, or what a trusted proxy wrote
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
    return str(ip)
