"""Whether a figure that was sampled for a while has grown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median


@dataclass(frozen=True, slots=True)
class Verdict:
    """Medians of the middle and the last third, what the trend over both adds up to, and how much of either growth is
    allowed. The first third is warm-up and does not count."""

    middle: float
    last: float
    growth: float
    allowed: float

    @property
    def flat(self) -> bool:
        """True where neither the trend nor the medians have grown by more than is allowed; to shrink is no leak."""
        return max(self.growth, self.last - self.middle) <= self.allowed


def judge(values: Sequence[float], *, share: float, floor: float) -> Verdict:
    """Of values at even distances, 6 at least. Allowed is a share of the middle third's median, or `floor` where that
    is more. The trend is the median of the slopes between all pairs (Theil and Sen): outliers do not bend it."""
    if len(values) < 6:
        raise ValueError(f"{len(values)} samples; at least 6 are needed")
    third = len(values) // 3
    rest = values[third:]
    slope = median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(rest), 2))
    middle, last = median(rest[:-third]), median(rest[-third:])
    return Verdict(middle, last, slope * (len(rest) - 1), max(floor, share * middle))
