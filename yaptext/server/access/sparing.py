"""Log lines that anybody can cause: the first at once, then one every ten seconds with the number of the others."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Literal

from yaptext.server.access.caller import parsed

Shown = Literal["whole", "truncated", "none"]
OTHERS = "others"
_Kind = tuple[str, str | None, tuple[tuple[str, str | int], ...]]
"""An event, its address as it is shown, and its fields."""


class Sparing:
    """The first line of an event, its fields and an address is written at once, then every `every_s` one line that says
    how many more there were (`count`).

    At most `most` are counted separately at a time, so that many addresses fill neither the log nor the memory: more
    are logged with the address `others`. `how` is LOG_ADDRESS."""

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
    ip = parsed(address)
    if ip is None:
        return "unknown"
    return str(ip if how == "whole" else ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False))
