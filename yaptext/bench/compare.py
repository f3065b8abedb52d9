"""Two results side by side: the ratio of each figure, and how far it is to be believed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yaptext.bench.figures import HIGHER_IS_BETTER
from yaptext.bench.results import Place, ReportError, Result, statistic
from yaptext.bench.text import heading, number, table

FIGURES = (
    "decision_ms.p50",
    "decision_ms.p95",
    "ttft_ms.p50",
    "ttft_ms.p95",
    "inter_token_ms.p50",
    "inter_token_ms.p99",
    "total_ms.p50",
    "total_ms.p95",
    "cancel_to_silence_ms.p99",
    "tokens_per_s",
    "cached_ratio",
)
"""What is compared unless other figures are chosen."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """`value` is how many times as large the figure became; `low` and `high` bound the ratios of single rounds, each
    with each, and are None where there was only one. `worse` is above 1 where the change is for the worse."""

    place: Place
    figure: str
    before: float
    after: float
    value: float
    low: float | None
    high: float | None

    @property
    def worse(self) -> float:
        name = self.figure.partition(".")[0]
        if name in HIGHER_IS_BETTER:
            return 1 / self.value if self.value else float("inf")
        return self.value

    @property
    def is_noise(self) -> bool:
        """The rounds do not agree on whether it became more or less."""
        return self.low is not None and self.high is not None and self.low <= 1 <= self.high

    def fails(self, over: float) -> bool:
        """It got worse than by that factor, and no two rounds say otherwise."""
        return self.worse > over and not self.is_noise


def compare(before: dict[str, Any], after: dict[str, Any], figures: Iterable[str] = FIGURES) -> list[Ratio]:
    """Ratios after / before of what both have. Raises `ReportError` where that is nothing."""
    known = {Place.of(result): result for result in before["results"]}
    pairs = [(known[place], result) for result in after["results"] if (place := Place.of(result)) in known]
    ratios = [ratio for old, new in pairs for ratio in _ratios(old, new, figures, paired=False)]
    if not ratios:
        raise ReportError("the two have no target, scenario and number of sessions with one of the figures in common")
    return ratios


def beside(content: Mapping[str, Any], target: str, other: str, figures: Iterable[str] = FIGURES) -> list[Ratio]:
    """Ratios target / other inside one bench, where a round of the one goes with the same round of the other."""
    known = {Place.of(result): result for result in content["results"]}
    pairs = [
        (known[place._replace(target=other)], result)
        for place, result in known.items()
        if place.target == target and place._replace(target=other) in known
    ]
    return [ratio for old, new in pairs for ratio in _ratios(old, new, figures, paired=True)]


def _ratios(old: Result, new: Result, figures: Iterable[str], *, paired: bool) -> Iterator[Ratio]:
    for figure in figures:
        before, after = statistic(old, figure), statistic(new, figure)
        if before is None or after is None or not before[0]:
            continue
        low, high = _spread(before[1], after[1], paired=paired)
        yield Ratio(Place.of(new), figure, before[0], after[0], after[0] / before[0], low, high)


def _spread(
    before: Sequence[float | None], after: Sequence[float | None], *, paired: bool
) -> tuple[float | None, float | None]:
    pairs = zip(before, after, strict=False) if paired else itertools.product(before, after)
    ratios = [new / old for old, new in pairs if old and new is not None]
    return (min(ratios), max(ratios)) if len(ratios) > 1 else (None, None)


def shown(ratios: Sequence[Ratio], before: str, after: str, fail_over: float | None = None) -> str:
    """The table, with a word where a figure got worse than `fail_over`."""
    rows = [("", before, after, "ratio", "spread", "")]
    last: Place | None = None
    for ratio in ratios:
        if ratio.place != last:
            last = ratio.place
            rows.append((heading(last), "", "", "", "", ""))
        spread = "" if ratio.low is None or ratio.high is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
        verdict = "noise" if ratio.is_noise else "WORSE" if fail_over is not None and ratio.fails(fail_over) else ""
        rows.append(
            (f"  {ratio.figure}", number(ratio.before), number(ratio.after), f"{ratio.value:.2f}", spread, verdict)
        )
    return table(rows)
