"""A whole bench: every scenario at every number of sessions against every target, in rounds."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from yaptext import __version__
from yaptext.bench.conversation import Target
from yaptext.bench.plan import Plan
from yaptext.bench.results import FORMAT, Place, result_of
from yaptext.bench.run import Run
from yaptext.bench.scenarios import SCENARIOS

_SETTLE_S = 0.2
"""Between runs: what a server still does for the one before is not measured with the next."""


class Watcher(Protocol):
    """Who shows how far a bench is."""

    def begin(self, run: Run, number: int, of: int) -> None: ...

    def tick(self, run: Run) -> None: ...

    def end(self, run: Run) -> None: ...


class Campaign:
    """`measure` may be cut at any moment: `report` is then about the runs that were finished."""

    def __init__(self, plan: Plan, targets: Sequence[Target], watcher: Watcher) -> None:
        self._plan, self._targets, self._watcher = plan, targets, watcher
        self.nonce = f"{time.time_ns() // 1_000_000 % 16**8:08x}"
        """No server has seen these stories before, whatever was measured on it earlier."""
        self._begun = datetime.now(UTC)
        self._runs: dict[Place, list[Run]] = {}

    async def measure(self) -> None:
        """Raises `Refused` where a target cannot be reached at all."""
        for target in self._targets:
            conversation = target.conversation()
            await conversation.open()
            await conversation.close()
        steps = list(self._steps())
        with _many_sockets():
            for number, (run, scenario) in enumerate(steps, 1):
                self._watcher.begin(run, number, len(steps))
                await self._one(run, scenario)
                self._watcher.end(run)
                self._runs.setdefault(Place(run.target.name, run.scenario, run.sessions), []).append(run)
                await asyncio.sleep(_SETTLE_S)
        for target in self._targets:
            target.close()

    def _steps(self) -> Iterator[tuple[Run, str]]:
        """Targets alternate, and who comes first alternates, too: what the machine does meanwhile meets all alike."""
        for round_number in range(self._plan.rounds):
            shift = round_number % len(self._targets)
            for scenario in self._plan.scenarios:
                for sessions in self._plan.sizes(scenario):
                    for target in (*self._targets[shift:], *self._targets[:shift]):
                        yield Run(self._plan, target, scenario, sessions, round_number + 1, self.nonce), scenario

    async def _one(self, run: Run, scenario: str) -> None:
        gc.collect()
        gc.disable()  # a pause of the bench would be measured as one of the server; a run is short
        ticking = asyncio.create_task(self._tick(run))
        try:
            async with run.clock():
                await SCENARIOS[scenario](run)
        finally:
            ticking.cancel()
            gc.enable()

    async def _tick(self, run: Run) -> None:
        while True:
            self._watcher.tick(run)
            await asyncio.sleep(0.2)

    def report(self) -> dict[str, Any]:
        return {
            "bench": FORMAT,
            "version": __version__,
            "begun": self._begun.isoformat(timespec="seconds"),
            "targets": {target.name: target.url for target in self._targets},
            "plan": dataclasses.asdict(self._plan),
            "client": {"python": platform.python_version(), "machine": platform.machine()},
            "results": [result_of(runs) for runs in self._runs.values()],
        }


@contextmanager
def _many_sockets() -> Iterator[None]:
    """As many open files as the system lets a user have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
