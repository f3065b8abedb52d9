"""The registry of connections: everything that holds a slot, by its key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Protocol

from yaptext.errors import WireError


class Holder(Protocol):
    """What holds a slot: a socket, or a request of `/v1/`."""

    @property
    def busy(self) -> bool:
        """True while a turn is running or waits to run."""
        ...

    def fail(self, error: WireError) -> None:
        """The turn that runs or waits ends with this error."""
        ...

    def end(self, error: WireError) -> None:
        """Ends it with an error. The first reason counts."""
        ...


class Slots:
    """The connections that hold a slot. Nothing here limits: `Admission` and `Account` do, by what they find here."""

    def __init__(self) -> None:
        self._held: dict[Hashable, set[Holder]] = {}
        self._changed = asyncio.Event()
        self.on_rest: Callable[[Holder], None] = lambda holder: None
        """Called when a turn of a holder has ended and none runs or waits: a drain closes the socket then."""

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def __iter__(self) -> Iterator[Holder]:
        return chain.from_iterable(self._held.values())

    def of(self, key: Hashable) -> Collection[Holder]:
        return self._held.get(key, ())

    @property
    def busy(self) -> int:
        """How many have a turn that runs or waits."""
        return sum(holder.busy for holder in self)

    @contextmanager
    def held(self, key: Hashable, holder: Holder) -> Iterator[None]:
        holders = self._held.setdefault(key, set())
        holders.add(holder)
        try:
            yield
        finally:
            holders.discard(holder)
            if not holders:
                del self._held[key]
            self._changed.set()

    def at_rest(self, holder: Holder) -> None:
        self.on_rest(holder)
        self._changed.set()

    async def until(self, true: Callable[[], bool], within_s: float) -> None:
        """Waits until it is true, at most so long. It is looked at when a holder has left or is at rest."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not true():
                    self._changed.clear()
                    await self._changed.wait()
