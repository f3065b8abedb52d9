"""bench/growing_history.py: what it counts, over a scripted engine that has a prefix cache of its own."""

from __future__ import annotations

import pytest
from bench.growing_history import WAYS, arguments, figures, measure, shown
from fakes import ScriptedEngine

from yaptext.bench.turn import Turn


def turn(prompt: int, cached: int, ttft_ms: float) -> Turn:
    found = Turn(10.0)
    found.token("word", 10.0 + ttft_ms / 1000)
    found.prompt_tokens, found.cached_tokens = prompt, cached
    return found


def test_the_first_turn_does_not_count() -> None:
    """Nothing of it could be in the cache."""
    found = figures(WAYS[0], [turn(100, 0, 900), turn(200, 150, 30), turn(300, 250, 20)])
    assert found["share"] == pytest.approx(400 / 500) and found["left_tokens"] == 50
    assert found["ttft_ms"] == pytest.approx(25) and found["prompt_tokens"] == [100, 200, 300]


async def test_every_way_finds_what_was_there() -> None:
    """A turn leaves at most two utterances, the last reply and the rest of a block."""
    given = arguments(["--turns", "3", "--pause", "0.3"])
    found = await measure(ScriptedEngine(), given)
    assert [each["way"] for each in found] == [way.name for way in WAYS]
    assert all(len(each["prompt_tokens"]) == 3 and each["cached_tokens"][0] == 0 for each in found)
    for each in found:
        assert each["left_tokens"] <= 90 and each["prompt_tokens"][-1] >= 300, each
        assert f"{each['share']:.1%}" in shown(found)
