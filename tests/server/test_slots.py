"""server/slots.py: the connections that hold a slot, and what a drain and a removed key find there."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from yaptext.errors import WireError
from yaptext.server.slots import Slots


class Quiet:
    """Holds a slot."""

    busy = False

    def fail(self, error: WireError) -> None: ...

    def end(self, error: WireError) -> None: ...


def test_a_slot_is_found_by_its_key_until_it_is_left() -> None:
    """Whatever ends it; a key without a slot leaves nothing behind."""
    slots, holders = Slots(), [Quiet(), Quiet(), Quiet()]
    with ExitStack() as stack:
        for key, holder in zip("aab", holders, strict=True):
            stack.enter_context(slots.held(key, holder))
        assert len(slots) == 3 and set(slots) == set(holders)
        assert set(slots.of("a")) == set(holders[:2]) and list(slots.of("b")) == holders[2:] and not slots.of("c")
        with pytest.raises(ZeroDivisionError), slots.held("c", holder := Quiet()):
            assert list(slots.of("c")) == [holder]
            raise ZeroDivisionError
        assert not slots.of("c")
    assert not len(slots) and not list(slots)


async def test_who_waits_hears_of_every_rest_and_every_leave() -> None:
    """Two may wait at once, and at most as long as they said."""
    slots, rested = Slots(), list[Quiet]()
    slots.on_rest = rested.append  # type: ignore[assignment]
    one, other = Quiet(), Quiet()
    one.busy = True
    begun = asyncio.get_running_loop().time()
    with slots.held("a", one), slots.held("b", other):
        await slots.until(lambda: not slots.busy, 0.05)
        assert asyncio.get_running_loop().time() - begun >= 0.05 and slots.busy == 1
        quiet = asyncio.create_task(slots.until(lambda: not slots.busy, 60))
        empty = asyncio.create_task(slots.until(lambda: not len(slots), 60))
        await asyncio.sleep(0)
        one.busy = False
        slots.at_rest(one)
        await quiet
        assert rested == [one] and not empty.done()
    await empty
