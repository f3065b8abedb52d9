"""The drain: running turns may finish, each socket is closed after its turn, the quiet ones at the end."""

from __future__ import annotations

import asyncio
import random

import structlog

from yaptext.observe.systemd import notify
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.slots import Slots

_log = structlog.get_logger(__name__)
_CLOSE_EVERY_S, _CLOSES_WITHIN_S = 0.02, 1.0
"""A drain closes sockets one by one, so that neither this process nor the next, or a proxy, has them all at once."""
_LEAVE_S = 3.0
"""How long clients may take to read their close."""


async def drain(lifecycle: Lifecycle, slots: Slots, timeout_s: float) -> None:
    """Refuses new sockets, lets running turns finish within the time, then sends everyone away, one by one.

    A socket is closed after its turn: among many clients there is hardly a moment without a turn.
    """
    if lifecycle.phase == "ready":
        lifecycle.phase = "draining"
        notify("STOPPING=1", "STATUS=Finishing the running turns.")
        _log.info("drain.begun", connections=len(slots), timeout_s=timeout_s)
        slots.on_rest = lambda holder: holder.end(lifecycle.going_away())
        await slots.until(lambda: not slots.busy, timeout_s)
        cut, leaving = slots.busy, list(slots)
        random.shuffle(leaving)
        for holder in leaving:
            holder.end(lifecycle.going_away())
            await asyncio.sleep(min(_CLOSE_EVERY_S, _CLOSES_WITHIN_S / len(leaving)))
        await slots.until(lambda: not len(slots), _LEAVE_S)
        _log.info("drain.finished", turns_cut=cut)
    lifecycle.exit_requested.set()
