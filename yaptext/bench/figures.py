"""Percentiles: what is made of many turns."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from yaptext.bench.turn import Turn

STATISTICS = ("p50", "p95", "p99", "max")
_CURVE_POINTS = 40

Samples = dict[str, list[float]]

HIGHER_IS_BETTER = {"tokens_per_s", "cached_ratio"}

MEANINGS = {
    "connect_ms": "opening a socket until the service answers a ping on it",
    "warm_ms": "warm_persona and warm_history until the last `warmed`",
    "ack_ms": "`start` sent until `ack`",
    "decision_ms": "`start` sent until `toolcall`",
    "ttft_ms": "`start` sent until the first token",
    "first_sentence_ms": "`start` sent until the token that ends the first sentence",
    "inter_token_ms": "between two token frames of one turn; tokens merged into one frame count as one",
    "total_ms": "`start` sent until `done`",
    "cancel_to_silence_ms": "`cancel` sent until the last frame of its turn",
    "start_to_silence_ms": "a new `start` sent until the last frame of the turn that it interrupts",
    "server_cancel_ms": "`cancel_ms` as the service reports it",
    "cancel_to_freed_ms": "all turns cancelled at once until no engine stream is left, to the resolution of a poll",
    "back_ms": "a dropped socket until the first token on the one after it, waits for a free place included",
    "retry_after_ms": "the wait that refusals ask for",
    "readmitted_ms": "a slot released until the refused client gets it, its wait included",
    "completion_tokens": "length of the finished replies",
    "client_lag_ms": "how late timers of the bench itself ran: what it adds to everything above",
    "tokens_per_s": "tokens of all replies a second",
    "cached_ratio": "share of prompt tokens that the prefix cache held",
}


def summary(samples: Iterable[float]) -> dict[str, Any]:
    """Count, mean, percentiles, and a `curve` of evenly spaced ones to draw the distribution from. Raises `ValueError`
    if there are no samples."""
    values = np.fromiter(samples, float)
    if not values.size:
        raise ValueError("no samples")
    p50, p95, p99, *curve = (
        np.quantile(values, (0.5, 0.95, 0.99, *np.linspace(0, 1, _CURVE_POINTS + 1))).round(3).tolist()
    )
    mean = round(float(values.mean()), 3)
    return {"count": values.size, "mean": mean, "p50": p50, "p95": p95, "p99": p99, "max": curve[-1], "curve": curve}


def samples_of(turns: Iterable[Turn]) -> Samples:
    """Milliseconds by figure. A turn's `part` stands before the name, so that parts do not mix."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for turn in turns:
        part = f"{turn.part}_" if turn.part else ""

        def add(name: str, since: float | None, until: float | None, part: str = part) -> None:
            if since is not None and until is not None:
                found[part + name].append((until - since) * 1000)

        add("ack_ms", turn.sent_at, turn.acked_at)
        add("decision_ms", turn.sent_at, turn.decided_at)
        if turn.arrivals:
            add("ttft_ms", turn.sent_at, turn.arrivals[0])
        add("first_sentence_ms", turn.sent_at, turn.sentence_at)
        for earlier, later in itertools.pairwise(turn.arrivals):
            add("inter_token_ms", earlier, later)
        if turn.outcome == "done":
            add("total_ms", turn.sent_at, turn.last_at)
            found[part + "completion_tokens"].append(turn.completion_tokens)
        if turn.outcome == "cancelled":
            silence = "start_to_silence_ms" if turn.replaced else "cancel_to_silence_ms"
            add(silence, turn.cancelled_at, turn.last_at)
            if turn.server_cancel_ms is not None:
                found[part + "server_cancel_ms"].append(turn.server_cancel_ms)
    return dict(found)


def pooled(rounds: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """One summary a figure over all rounds, and under `rounds` each statistic's value in each round (None in a round
    without a sample)."""
    figures = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(rounds)):
        alone = [summary(samples[name]) if samples.get(name) else {} for samples in rounds]
        if any(alone):
            figures[name] = summary(itertools.chain.from_iterable(samples.get(name, ()) for samples in rounds))
            figures[name]["rounds"] = {key: [each.get(key) for each in alone] for key in STATISTICS}
    return figures
