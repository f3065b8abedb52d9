"""The watch over the engines: a dead one ends the process, a silent one leaves the supervisor's watchdog unfed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import partial

import structlog

from yaptext.engine.base import Engines
from yaptext.errors import EngineDead
from yaptext.observe.systemd import notify
from yaptext.server.lifecycle import WATCH_S, Lifecycle
from yaptext.server.pulse import Pulse
from yaptext.server.slots import Slots

_log = structlog.get_logger(__name__)
PROBE_EVERY_S = 15.0
"""Engines are asked for a token at least so often, and twice in the time of the supervisor's watchdog."""
_LEAVE_S = 1.0
"""How long clients of a dead engine may take to read their close."""


@asynccontextmanager
async def watching(
    lifecycle: Lifecycle,
    engines: Engines,
    slots: Slots,
    watchdog_s: float | None = None,
    *more: Coroutine[None, None, None],
) -> AsyncIterator[None]:
    """While the block runs, a dead engine ends every turn and the process, the supervisor hears of one that does not
    answer, and its watchdog (`watchdog_s`) is fed as long as every engine answers. `more` runs beside these."""
    every_s = min(PROBE_EVERY_S, watchdog_s / 2) if watchdog_s else PROBE_EVERY_S
    lifecycle.pulses = [Pulse(role, engine, lifecycle.tell) for role, engine in engines.distinct.items()]
    watches = [_watch(lifecycle, slots), *more, *_probes(lifecycle.pulses, every_s)]
    tasks = [asyncio.create_task(_guard(lifecycle, watch)) for watch in watches]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _guard(lifecycle: Lifecycle, watch: Coroutine[None, None, None]) -> None:
    """If a watch itself fails, the process ends: nothing else would notice what it was there to see."""
    try:
        await watch
    except Exception:
        _log.exception("watch.crashed")
        lifecycle.phase = "dead"
        lifecycle.exit_requested.set()


def _probes(pulses: list[Pulse], every_s: float) -> Iterator[Coroutine[None, None, None]]:
    """One for each engine. The watchdog is fed whenever all have been heard since the last time."""
    unheard = set(pulses)

    def heard(pulse: Pulse) -> None:
        unheard.discard(pulse)
        if not unheard:
            notify("WATCHDOG=1")
            unheard.update(pulses)

    for pulse in pulses:
        yield pulse.keep(every_s, partial(heard, pulse))


async def _watch(lifecycle: Lifecycle, slots: Slots) -> None:
    while True:
        for pulse in lifecycle.pulses:
            try:
                await pulse.check()
            except EngineDead as error:
                cause = " ".join(getattr(error, "__notes__", ()))
                _log.critical("engine.died", engine=pulse.role, model=pulse.engine.model, error=cause or error.message)
                lifecycle.phase = "dead"
                notify(f"STATUS=The {pulse.role} engine died. {cause}".strip())
                for holder in list(slots):
                    holder.fail(error)
                    holder.end(lifecycle.going_away())
                await slots.until(lambda: not len(slots), _LEAVE_S)
                lifecycle.exit_requested.set()
                return
        await asyncio.sleep(WATCH_S)
