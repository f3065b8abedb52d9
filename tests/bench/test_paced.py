"""bench/paced.py: an engine that is on time, and tells when each token was due."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from bench.paced import STAMP, PacedEngine, due_times, stamp

from yaptext.engine.base import Sampling


def test_a_token_tells_when_it_was_due() -> None:
    """To the microsecond, also where its clock has wrapped since, and each of several that were merged."""
    for due in (12.345678, 99.999999, 1234567.000001):
        assert due_times(stamp(due), due + 0.25) == [pytest.approx(due, abs=2e-6)]
    merged = stamp(99.98) + stamp(100.03)
    assert len(merged) == 2 * STAMP and due_times(merged, 100.04) == pytest.approx([99.98, 100.03], abs=2e-6)


@pytest.mark.parametrize("slots", [1, 10])
async def test_tokens_are_due_at_even_distances(slots: int) -> None:
    """Whenever this process comes to emitting them."""
    engine = PacedEngine(rate=100, slots=slots)
    due = []
    async for delta in engine.stream([], Sampling(max_tokens=5)):
        due += due_times(delta.text, time.monotonic())
        time.sleep(0.015)  # noqa: ASYNC251  a loop that falls behind is what this is about
    assert [later - earlier for earlier, later in pairwise(due)] == pytest.approx([0.01] * 4, abs=1e-5)
    assert engine.running == 0
    await engine.aclose()
