"""What one engine has yet to compute before first tokens come, by the speed that is seen from outside."""

from __future__ import annotations

import time
from collections.abc import Callable

_SHARE_WEIGHT, _FADING = 0.1, 0.999
"""How much the newest prompt counts in the share that the cache lacks; how the best speed fades, a prompt at a time."""


class Prefill:
    """Told of every prompt as it comes, and again at its first token or where it leaves without one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._streams = self._tokens = 0
        self._share = 1.0
        self._since, self._computed = 0.0, 0
        self.tokens_per_s = 0.0
        """Its best speed of the recent past: a time with little work shows less than the engine can do."""

    @property
    def backlog_ms(self) -> float:
        """Until all that waits has its first token; 0 where no speed is known."""
        return 1000 * self._tokens * self._share / self.tokens_per_s if self.tokens_per_s else 0.0

    def begin(self, tokens: int) -> None:
        if not self._streams:
            self._since, self._computed = self._clock(), 0
        self._streams += 1
        self._tokens += tokens

    def end(self, tokens: int, cached: int | None = None) -> None:
        """`cached` is None where no first token came."""
        self._streams -= 1
        self._tokens -= tokens
        if cached is not None:
            self._computed += tokens - cached
            self._share += _SHARE_WEIGHT * ((tokens - cached) / tokens - self._share)
            shown = self._computed / max(self._clock() - self._since, 0.001)
            self.tokens_per_s = max(shown, _FADING * self.tokens_per_s)
