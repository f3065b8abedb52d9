"""An engine that emits tokens on time, whatever the process around it does; each token tells when it was due."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # fakes.py
from fakes import ScriptedEngine

from yaptext.engine.base import CHAT, Delta, Sampling

STAMP = 9
"""Characters of a token: a space, and microseconds of the machine's monotonic clock without what is above 100 s."""
_WRAP_US = 10**8


def stamp(due: float) -> str:
    return f" {round(due * 1e6) % _WRAP_US:08d}"


def due_times(text: str, arrival: float) -> list[float]:
    """When the tokens of a frame were due, by the same clock as `arrival`."""
    found = []
    for start in range(0, len(text), STAMP):
        age = (round(arrival * 1e6) - int(text[start + 1 : start + STAMP])) % _WRAP_US
        found.append(arrival - (age if age < _WRAP_US // 2 else age - _WRAP_US) / 1e6)
    return found


class _Stream:
    """The end of one request that its reader waits at, made as vLLM makes it: a queue and an event."""

    def __init__(self) -> None:
        self.waiting: deque[float] = deque()
        self.news = asyncio.Event()


class PacedEngine(ScriptedEngine):
    """Every stream gets `rate` tokens a second. With `slots=1` all get theirs in one step, as from one engine whose
    batch they share; with more slots steps come that many times as often, and each is for its share of the streams.

    A token is due by the clock, not when this process comes to emitting it: an engine is a process of its own, and a
    loop that falls behind would otherwise slow down the very thing that it is measured against.
    """

    def __init__(self, rate: float, slots: int) -> None:
        super().__init__()
        self._period_s = 1 / rate
        self._slots: list[set[_Stream]] = [set() for _ in range(slots)]
        self._next = 0
        self._pacemaker: asyncio.Task[None] | None = None

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling, *, priority: int = CHAT
    ) -> AsyncGenerator[Delta, None]:
        if self._pacemaker is None:
            self._pacemaker = asyncio.create_task(self._pace())
        stream, slot = _Stream(), self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.add(stream)
        self.running += 1
        left = sampling.max_tokens
        try:
            while left:
                while not stream.waiting:
                    stream.news.clear()
                    await stream.news.wait()
                due = stream.waiting.popleft()
                left -= 1
                yield Delta(stamp(due), 1, len(prompt), 0, None if left else "length")
        finally:
            slot.discard(stream)
            self.running -= 1

    async def _pace(self) -> None:
        begun = time.monotonic()
        step_s = self._period_s / len(self._slots)
        number = 0
        while True:
            number += 1
            due = begun + number * step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            for stream in self._slots[number % len(self._slots)]:
                stream.waiting.append(due)
                stream.news.set()

    async def aclose(self, *, at_once: bool = False) -> None:
        if self._pacemaker is not None:
            self._pacemaker.cancel()
