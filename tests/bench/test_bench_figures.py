"""tools/bench: percentiles, and what is made of a turn's times."""

from __future__ import annotations

import asyncio
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yaptext.bench.figures import pooled, samples_of, summary
from yaptext.bench.turn import Turn

values = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


def spoken(*arrivals: float, text: str = "word", part: str = "", sent_at: float = 10.0) -> Turn:
    """A finished turn with a token at each of the times after its `start`."""
    turn = Turn(sent_at, part)
    for arrival in arrivals:
        turn.token(text, sent_at + arrival)
    return turn


def test_percentiles_are_those_of_the_textbook() -> None:
    """Interpolated between the nearest two; of one sample all are that sample."""
    found = summary([5, 1, 4, 2, 3])
    assert (found["count"], found["mean"], found["max"]) == (5, 3.0, 5.0)
    assert [found["curve"][point] for point in (0, 10, 20, 40)] == [1, 2, 3, 5] and found["p95"] == 4.8
    assert set(summary([7.0])["curve"]) == {summary([7.0])["p99"]} == {7.0}
    assert summary([1.0, 2.0])["p50"] == 1.5


@given(values)
def test_percentiles_agree_with_the_standard_library(samples: list[float]) -> None:
    """`statistics.quantiles` with the inclusive method is the same definition."""
    if len(samples) > 1:
        found, expected = summary(samples), statistics.quantiles(samples, n=100, method="inclusive")
        p = [found[name] for name in ("p50", "p95", "p99")]
        assert p == pytest.approx([expected[share - 1] for share in (50, 95, 99)], abs=1e-3)
        fortieths = statistics.quantiles(samples, n=40, method="inclusive")
        assert found["curve"] == pytest.approx([min(samples), *fortieths, max(samples)], abs=1e-3)


@given(values)
def test_a_summary_is_in_order(samples: list[float]) -> None:
    """p50, p95, p99 and max do not decrease, and neither does the curve."""
    found = summary(samples)
    assert found["p50"] <= found["p95"] <= found["p99"] <= found["max"] == pytest.approx(max(samples), abs=1e-3)
    assert found["count"] == len(samples) and found["curve"] == sorted(found["curve"])


def test_a_turn_becomes_its_figures() -> None:
    """Milliseconds from the `start`, gaps between token frames, and the length of the reply."""
    turn = spoken(0.1, 0.15, 0.25)
    turn.acked_at, turn.decided_at, turn.completion_tokens = 10.002, 10.05, 4
    turn.end("done", 10.3)
    found = {name: [round(value, 3) for value in samples] for name, samples in samples_of([turn]).items()}
    assert found == {
        "ack_ms": [2.0],
        "decision_ms": [50.0],
        "ttft_ms": [100.0],
        "first_sentence_ms": [300.0],
        "inter_token_ms": [50.0, 100.0],
        "total_ms": [300.0],
        "completion_tokens": [4],
    }


def test_silence_is_counted_from_what_asked_for_it() -> None:
    """A cancel and a new start are two figures, and a cancelled turn has no total."""
    cancelled, replaced = spoken(0.1), spoken(0.1)
    for turn in (cancelled, replaced):
        turn.cancelled_at = 10.2
        turn.end("cancelled", 10.204)
    cancelled.server_cancel_ms, replaced.replaced = 0.5, True
    found = samples_of([cancelled, replaced])
    assert found["cancel_to_silence_ms"] == [pytest.approx(4.0)] == found["start_to_silence_ms"]
    assert found["server_cancel_ms"] == [0.5] and "total_ms" not in found


def test_a_turn_that_ended_before_its_cancel_has_no_silence() -> None:
    """The cancel came too late to do anything."""
    turn = spoken(0.1)
    turn.cancelled_at = 10.2
    turn.end("done", 10.201)
    assert "cancel_to_silence_ms" not in samples_of([turn])


def test_parts_do_not_mix() -> None:
    """Turns before a disturbance stand under a name of their own."""
    found = samples_of([spoken(0.1, part="calm"), spoken(0.2)])
    assert found["calm_ttft_ms"] == [pytest.approx(100)] and found["ttft_ms"] == [pytest.approx(200)]


@pytest.mark.parametrize(
    ("pieces", "at"),
    [
        (["Yes", ".", " And"], 0.2),
        (["Yes.", " And"], 0.1),
        (["No", "!\n", "x"], 0.2),
        (["He said “yes", ".”", " So"], None),  # only plain quotes close a sentence
        (['"Yes', '."', " So"], 0.2),
        (["3", ".5", " km"], None),
        (["one", " two"], None),
    ],
)
def test_the_first_sentence_ends_at_its_full_stop(pieces: list[str], at: float | None) -> None:
    """At the frame that brings it, wherever frames are cut."""
    turn = Turn(0.0)
    for number, piece in enumerate(pieces, 1):
        turn.token(piece, number / 10)
    assert turn.sentence_at == at


async def test_a_wait_for_a_token_ends_with_the_token_or_the_turn() -> None:
    """True where it came, False where the turn was over before, at once where that is known already."""
    turn = Turn(0.0)
    turn.token("a", 1.0)
    assert await turn.reaches(1)
    waiting = asyncio.create_task(turn.reaches(3))
    await asyncio.sleep(0)
    turn.token("b", 2.0)
    assert not waiting.done()
    turn.token("c", 3.0)
    assert await waiting
    waiting = asyncio.create_task(turn.reaches(9))
    await asyncio.sleep(0)
    turn.end("done", 4.0)
    assert not await waiting and not await turn.reaches(1)


def test_only_the_first_end_counts() -> None:
    """A closed connection does not undo a `done`."""
    turn = spoken(0.1)
    turn.end("done", 10.2)
    turn.end("failed", 10.3, "closed_1006")
    assert (turn.outcome, turn.last_at, turn.error) == ("done", 10.2, None)


def test_rounds_are_pooled_and_kept() -> None:
    """The figure is over all samples, its spread is over the rounds; a round without a sample has None."""
    found = pooled([{"ttft_ms": [1.0, 3.0], "warm_ms": []}, {"ttft_ms": [5.0]}, {}])
    assert found["ttft_ms"]["p50"] == 3.0 and found["ttft_ms"]["count"] == 3
    assert found["ttft_ms"]["rounds"]["p50"] == [2.0, 5.0, None]
    assert "warm_ms" not in found
