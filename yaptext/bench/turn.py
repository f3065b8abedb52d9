"""One turn as its client saw it: when each of its frames arrived."""

from __future__ import annotations

import asyncio
import re
from typing import Literal

Outcome = Literal["open", "done", "cancelled", "failed"]
_SENTENCE_END = re.compile(r"[.!?…][\"')\]]*(\s|$)")


class Turn:
    """Times are `time.perf_counter()` in seconds; None is a point that was not reached.

    `arrivals` has one time for each token frame. A server that merges waiting tokens sends fewer frames than the
    model made tokens, and such a frame counts as one arrival: what a listener would notice is the gap before it.
    """

    __slots__ = (
        "_goal",
        "_reached",
        "acked_at",
        "arrivals",
        "cached_tokens",
        "cancelled_at",
        "completion_tokens",
        "decided_at",
        "error",
        "last_at",
        "outcome",
        "over",
        "part",
        "prompt_tokens",
        "replaced",
        "sent_at",
        "sentence_at",
        "server_cancel_ms",
        "text",
    )

    def __init__(self, sent_at: float, part: str = "") -> None:
        """`part` names what the turn is not to be mixed with, for example the turns before a disturbance."""
        self.sent_at, self.part = sent_at, part
        self.acked_at: float | None = None
        self.decided_at: float | None = None
        self.sentence_at: float | None = None
        self.arrivals: list[float] = []
        self.text: list[str] = []
        self.last_at: float | None = None
        self.cancelled_at: float | None = None
        self.replaced = False
        """It was cut by a new `start`, not by a `cancel`."""
        self.server_cancel_ms: float | None = None
        self.prompt_tokens = self.completion_tokens = 0
        self.cached_tokens: int | None = None
        self.outcome: Outcome = "open"
        self.error: str | None = None
        self.over = asyncio.Event()
        self._goal = 0
        self._reached: asyncio.Future[bool] | None = None

    def token(self, text: str, now: float) -> None:
        """One token frame. This is the path that has to be cheap."""
        self.arrivals.append(now)
        self.text.append(text)
        if self.sentence_at is None and _SENTENCE_END.search("".join(self.text[-2:])):
            self.sentence_at = now
        if len(self.arrivals) == self._goal:
            self._settle(True)

    def end(self, outcome: Outcome, now: float, error: str | None = None) -> None:
        """The last frame of the turn, or the end of its connection. The first call counts."""
        if self.outcome != "open":
            return
        self.outcome, self.last_at, self.error = outcome, now, error
        if outcome == "done" and self.arrivals:
            self.sentence_at = self.sentence_at or now  # a reply without a full stop is one sentence
        self._settle(False)
        self.over.set()

    async def reaches(self, frames: int) -> bool:
        """Waits until that many token frames have arrived: True, or False where the turn was over before."""
        if len(self.arrivals) >= frames or self.outcome != "open":
            return self.outcome == "open"
        self._goal, self._reached = frames, asyncio.get_running_loop().create_future()
        return await self._reached

    def _settle(self, reached: bool) -> None:
        if self._reached is not None and not self._reached.done():
            self._reached.set_result(reached)
