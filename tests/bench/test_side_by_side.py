"""bench/side_by_side.py: what is made of the turns of its rounds."""

from __future__ import annotations

import pytest
from bench.side_by_side import figures, shown

from yaptext.bench.turn import Turn


def turn(ttft_s: float, e2e_s: float) -> Turn:
    found = Turn(10.0)
    found.token("word", 10.0 + ttft_s)
    found.end("done", 10.0 + e2e_s)
    found.prompt_tokens, found.cached_tokens, found.completion_tokens = 40, 32, 1
    return found


def test_ratios_are_taken_within_a_round() -> None:
    """A round in which the machine was busy slows all down alike: it counts as any other."""
    seconds = {"raw": 1.0, "service": 1.1, "openai": 2.0}
    rounds = [{name: [turn(slow * s, slow * s * 2)] for name, s in seconds.items()} for slow in (1.0, 5.0, 1.0)]
    found = figures(rounds, {"service": 0.006, "openai": 0.012})
    for figure in ("ttft", "e2e"):
        for label in ("p50", "p95"):
            ratio = found["ratios"][f"service/raw {figure} {label}"]
            assert [ratio[name] for name in ("low", "median", "high")] == pytest.approx([1.1] * 3)
            assert found["ratios"][f"service/openai {figure} {label}"]["median"] == pytest.approx(0.55)
    service = found["targets"]["service"]
    assert service["turns"] == 3 and service["cpu_ms"] == pytest.approx(2) and service["cached_tokens"] == 32
    assert found["targets"]["raw"]["cpu_ms"] == 0
    assert "1.10 (1.10-1.10)" in shown({"sessions": {"8": found}})
