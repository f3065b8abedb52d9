"""The phase of the process (starting, ready, draining, dead) as its supervisor hears of it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import structlog

from yaptext.errors import GoingAway, YapError
from yaptext.observe.systemd import notify
from yaptext.server.pulse import Pulse
from yaptext.server.record import Record

_log = structlog.get_logger(__name__)
WATCH_S = 0.5
_MOST_STATUS_BYTES = 1000
"""systemd drops a message of over 4096 bytes."""
_RETRY_AFTER_MS = (1000, 4000)
"""Clients of a restart come back spread over this window after the time of a start, not all at once."""

Phase = Literal["starting", "ready", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class Reload:
    """What became of the latest reload: `error` says what was refused. `at` is in UTC."""

    ok: bool
    error: str | None
    at: str


class Lifecycle:
    """The phase, and what there is to say of it."""

    def __init__(self) -> None:
        self._phase: Phase = "starting"
        self._started = asyncio.Event()
        self.on_loopback = False
        """True if nothing but this machine reaches the service."""
        self.exit_requested = asyncio.Event()
        self.failure: YapError | None = None
        self.pulses: list[Pulse] = []
        self.reload: Reload | None = None
        """None until the first SIGHUP."""
        self.address = ""
        """Where it serves."""
        self.start_s = 0.0
        """How long the start took."""
        self.start_told: list[str] = []
        """What to know of the start, in sentences."""
        self.troubles: list[str] = []
        """What goes wrong although the service serves, in sentences."""

    @property
    def phase(self) -> Phase:
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        if phase != "starting":
            self._started.set()

    @property
    def silence(self) -> str | None:
        """Which engines do not answer, in words."""
        return " ".join(pulse.silence for pulse in self.pulses if pulse.silence is not None) or None

    def tell(self, *assignments: str) -> None:
        """Tells the supervisor where the service serves, and what is wrong (`STATUS=`)."""
        if self.phase != "ready":
            return
        told = [f"Serving on {self.address}.", self.silence or "", *self.troubles]
        if self.reload is not None and not self.reload.ok:
            told.append(f"The last reload was refused: {self.reload.error}")
        line = " ".join(" ".join(told + self.start_told).split()).encode(errors="replace")[:_MOST_STATUS_BYTES]
        notify(*assignments, f"STATUS={line.decode(errors='ignore')}")

    async def keep_told(self, look: Callable[[], list[str]]) -> None:
        """Runs for ever: reports every change of the troubles to the supervisor."""
        while True:
            if (found := look()) != self.troubles:
                self.troubles = found
                self.tell()
            await asyncio.sleep(WATCH_S)

    @contextmanager
    def reloading(self) -> Iterator[list[str]]:
        """Around a reload. The block adds why something was refused."""
        refused: list[str] = []
        if self.phase == "ready":
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield refused
        except Exception:
            _log.exception("reload.crashed")
            refused.append("a fault of the service; the log has the traceback (reload.crashed)")
        # File names may hold any bytes.
        error = "; ".join(refused).encode(errors="backslashreplace").decode()
        self.reload = Reload(not refused, error or None, datetime.now(UTC).isoformat(timespec="seconds"))
        self.tell("READY=1")

    @contextmanager
    def starting(self) -> Iterator[None]:
        """With an error of ours that the block raises the start ends, and it says enough."""
        try:
            yield
        except YapError as error:
            self.failure = error
            silence_uvicorn()
            raise

    def going_away(self) -> GoingAway:
        """With the time after which the next process is likely to be ready: what this one's start took."""
        wait_ms = round(self.start_s * 1000) + random.randint(*_RETRY_AFTER_MS)
        return GoingAway("The server is restarting.", retry_after_ms=wait_ms)

    async def while_ready(self, steps: AsyncGenerator[None, None]) -> None:
        """Takes step after step from READY on, until the last or until a drain begins."""
        await self._started.wait()
        async with aclosing(steps):
            async for _ in steps:
                if self.phase != "ready":
                    return


def silence_uvicorn() -> None:
    """For a start that ends for a known reason: uvicorn would log it as a crash, with a traceback."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)


def of_start(record: Record, warnings: list[str]) -> list[str]:
    """For the supervisor's status: what was not usual about a start."""
    told = [] if record.is_usual else [f"Started after {record.after}."]
    if warnings:
        told.append(
            f"{len(warnings)} {'warning' if len(warnings) == 1 else 'warnings'} at the start: {'; '.join(warnings)}"
        )
    return told
