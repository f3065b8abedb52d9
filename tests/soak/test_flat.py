"""soak/flat.py: what counts as growth."""

from __future__ import annotations

import random

import pytest
from soak.flat import judge


def noisy(*means: float, spread: float = 3.0) -> list[float]:
    chosen = random.Random(7)
    return [chosen.gauss(mean, spread) for mean in means]


def flat(values: list[float]) -> bool:
    return judge(values, share=0.05, floor=4).flat


def test_noise_around_a_level_is_flat() -> None:
    """Also with a few outliers, and after a steep warm-up."""
    values = noisy(*[100.0] * 60)
    values[25] = values[50] = 500
    assert flat(values)
    assert flat([number * 5 for number in range(20)] + values[20:])


def test_a_slow_steady_leak_is_found() -> None:
    """A tenth over the time that counts, in noise of the same size."""
    assert not flat(noisy(*[100 + 10 * number / 40 for number in range(-20, 40)]))


def test_a_late_step_is_found() -> None:
    """It bends no robust trend, and lifts the last third."""
    assert not flat(noisy(*[100.0] * 42, *[110.0] * 18))


def test_what_shrinks_is_flat() -> None:
    """Caches may be dropped."""
    assert flat(noisy(*[200 - number for number in range(60)]))


def test_the_floor_is_for_small_figures() -> None:
    """From 2 to 5 is not a leak of 150 %."""
    assert flat([2.0] * 40 + [5.0] * 20)
    assert not flat([2.0] * 40 + [7.0] * 20)


def test_too_few_samples_are_no_verdict() -> None:
    """Nothing is called flat unseen."""
    with pytest.raises(ValueError, match="5 samples"):
        judge([1, 1, 1, 1, 1], share=0.05, floor=1)
