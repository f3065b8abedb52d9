"""The pulse of an engine: whether it answers, by the tokens it gives or by a question for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog

from yaptext.engine.base import DECIDE, Engine, Sampling, exhaust
from yaptext.errors import EngineFailed, EngineUnavailable

_log = structlog.get_logger(__name__)
SILENT_S = 5.0
"""A question that waits for so long without a sign of life from the engine is a silence."""
_BACKLOG_TIMES, MOST_S = 4.0, 40.0
"""So much longer, in times of the backlog, but never over `MOST_S`: on CPU one step computes thousands of tokens of
waiting prompts, and the question has to wait for it (the demo model, six prompts of 2,965 tokens on a busy core: the
first token after 13 s, the last after more than 60). The backlog is told by the engine's best speed and a mean share of
cached tokens. A watchdog of a minute kills soon after `MOST_S`."""
LOOK_S = 0.5


class Pulse:
    """Whether one engine answers. `changed` is called when it falls silent or goes away, and when it is back."""

    def __init__(self, role: str, engine: Engine, changed: Callable[[], None]) -> None:
        self.role, self.engine, self._changed = role, engine, changed
        self.silent_since: datetime | None = None
        """When it was asked what it has not answered; None while it answers."""
        self.away: str | None = None
        """Why it cannot be reached; None while it can."""

    @property
    def silence(self) -> str | None:
        """What clients have to wait for, in words."""
        if self.away is not None:
            return f"The {self.role} engine is away: {self.away}"
        if self.silent_since is not None:
            return f"The {self.role} engine has not answered since {self.silent_since:%H:%M:%S} UTC."
        return None

    async def check(self) -> None:
        """Raises `EngineDead`. An engine that is away is noted: it may come back without this process."""
        try:
            await self.engine.check()
        except EngineUnavailable as error:
            if self.away is None:
                cause = " ".join(getattr(error, "__notes__", ()))
                _log.error("engine.away", engine=self.role, model=self.engine.model, error=cause or error.message)
                self.away = error.message
                self._changed()
        else:
            if self.away is not None:
                _log.info("engine.back", engine=self.role, model=self.engine.model)
                self.away = None
                self._changed()

    async def keep(self, every_s: float, heard: Callable[[], None]) -> None:
        """For ever: after each `every_s` calls `heard` if the engine has given first tokens meanwhile, or else asks it
        for one. `heard` is called for every sign of life."""
        while True:
            before = self.engine.load()
            await asyncio.sleep(every_s)
            load = self.engine.load()
            if load.prefill_tokens_per_s != before.prefill_tokens_per_s:  # each first token moves it
                heard()
            else:  # prompts whose users have left meanwhile are still computed, to the end of the step
                await self._ask(_patience_s(max(before.backlog_ms, load.backlog_ms)), heard)

    async def _ask(self, patience_s: float, heard: Callable[[], None]) -> None:
        """Returns when the question is answered; of a hung engine it never is.

        Time is counted in looks: a loop that stood still itself says nothing of the engine."""
        waited_s = 0.0
        before: tuple[float, ...] | None = None
        question = asyncio.create_task(self._token())
        try:
            while not (await asyncio.wait([question], timeout=LOOK_S))[0]:
                waited_s += LOOK_S
                load = self.engine.load()
                # Of the engine's last step. While the question is open a stream runs, so these are told as they are.
                signs = load.prefill_tokens_per_s, load.kv_use, load.requests
                if before is not None and signs != before:
                    waited_s, patience_s = 0.0, _patience_s(load.backlog_ms)
                    self._answers()
                    heard()
                elif waited_s >= patience_s and self.silent_since is None:
                    self._falls_silent(waited_s)
                before = signs
            self._answers()
            if question.result():
                heard()
        finally:
            question.cancel()
            await asyncio.wait([question])

    async def _token(self) -> bool:
        """False if the engine lives but fails."""
        try:
            prompt = await self.engine.codec.encode("ok")
            await exhaust(self.engine.stream(prompt, Sampling(max_tokens=1), priority=DECIDE))
        except EngineUnavailable:
            return True  # which `check` tells: to end this process brings no other one back
        except EngineFailed as error:
            _log.error("probe.failed", engine=self.role, model=self.engine.model, error=error.message)
            return False
        return True

    def _falls_silent(self, waited_s: float) -> None:
        self.silent_since = datetime.now(UTC) - timedelta(seconds=waited_s)
        _log.error("engine.silent", engine=self.role, model=self.engine.model, seconds=round(waited_s, 1))
        self._changed()

    def _answers(self) -> None:
        if self.silent_since is not None:
            seconds = (datetime.now(UTC) - self.silent_since).total_seconds()
            self.silent_since = None
            _log.info("engine.answers", engine=self.role, model=self.engine.model, seconds=round(seconds, 1))
            self._changed()


def _patience_s(backlog_ms: float) -> float:
    return min(MOST_S, SILENT_S + _BACKLOG_TIMES * backlog_ms / 1000)
