"""engine/vllm/backlog.py: how long waiting prompts take."""

from __future__ import annotations

import pytest

from yaptext.engine.vllm.backlog import Prefill


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def served(prefill: Prefill, clock: Clock, tokens: int, cached: int, seconds: float) -> None:
    prefill.begin(tokens)
    clock.now += seconds
    prefill.end(tokens, cached)


def test_nothing_known_is_no_backlog() -> None:
    """Before the first token ever came, nobody can say how long anything takes."""
    prefill = Prefill()
    prefill.begin(5000)
    assert prefill.backlog_ms == 0


def test_what_waits_takes_its_time_at_the_measured_speed() -> None:
    """Prompts that came together share the time; what left without a token counts no more."""
    clock = Clock()
    prefill = Prefill(clock)
    for _ in range(4):
        prefill.begin(1000)
    for _ in range(4):
        clock.now += 0.1
        prefill.end(1000, 0)
    assert prefill.tokens_per_s == pytest.approx(10_000, rel=0.01) and prefill.backlog_ms == 0
    for _ in range(3):
        prefill.begin(2000)
    assert prefill.backlog_ms == pytest.approx(600, rel=0.01)
    prefill.end(2000)
    assert prefill.backlog_ms == pytest.approx(400, rel=0.01)


def test_little_to_do_does_not_count_as_slow() -> None:
    """A hundred short turns hardly change what a long prompt has shown."""
    clock = Clock()
    prefill = Prefill(clock)
    served(prefill, clock, 3000, 0, 0.1)
    for _ in range(100):
        served(prefill, clock, 3000, 2990, 0.02)
    assert prefill.tokens_per_s > 27_000


def test_the_cached_share_is_not_waited_for() -> None:
    """As far as recent prompts tell."""
    clock = Clock()
    prefill = Prefill(clock)
    served(prefill, clock, 3000, 0, 0.1)
    prefill.begin(3000)
    cold = prefill.backlog_ms
    prefill.end(3000)
    for _ in range(50):
        served(prefill, clock, 3000, 2700, 0.02)
    prefill.begin(3000)
    assert prefill.backlog_ms == pytest.approx(cold * 0.1, rel=0.15)
