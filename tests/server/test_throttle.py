"""server/throttle.py: rates, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import pytest

from yaptext.server.throttle import Bucket, Sparing, Throttle, network


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_worth_may_come_at_once_and_then_evenly() -> None:
    """What is refused costs nothing, and the wait that is told is enough."""
    clock = Clock()
    bucket = Bucket(30, clock)
    assert [bucket.take() for _ in range(30)] == [0.0] * 30
    assert bucket.take() == bucket.take() == bucket.wait_s() == 2.0
    clock.now += 1.5
    assert bucket.take() == pytest.approx(0.5)
    clock.now += 0.5
    assert bucket.take() == 0.0 and bucket.take() == 2.0
    clock.now += 3600
    assert [bucket.take() for _ in range(31)] == [0.0] * 30 + [2.0]


def test_an_address_that_failed_too_often_waits() -> None:
    """Others do not; after a while it may fail again."""
    clock = Clock()
    throttle = Throttle(6, clock=clock)
    for _ in range(6):
        assert throttle.wait_s("192.0.2.1") == 0.0
        throttle.failed("192.0.2.1")
    assert throttle.wait_s("192.0.2.1") == 10.0 and throttle.wait_s("192.0.2.2") == 0.0
    clock.now += 10
    assert throttle.wait_s("192.0.2.1") == 0.0
    throttle.failed("192.0.2.1")
    assert throttle.wait_s("192.0.2.1") == 10.0


def test_memory_is_bounded_and_the_oldest_are_forgotten() -> None:
    """Of 100,000 addresses the latest 10,000 are known; one that goes on failing is among them."""
    throttle = Throttle(2, clock=Clock())
    for number in range(100_000):
        throttle.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        if number % 5000 == 0:
            throttle.failed("192.0.2.1")
    assert len(throttle) == 10_000
    assert throttle.wait_s("192.0.2.1") > 0


def test_zero_is_off() -> None:
    """Nothing is counted or kept."""
    throttle = Throttle(0)
    for _ in range(100):
        throttle.failed("192.0.2.1")
    assert throttle.wait_s("192.0.2.1") == 0.0 and len(throttle) == 0


@pytest.mark.parametrize(
    ("address", "whose"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:0db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
        ("unix:" + "x" * 100_000, "unix:" + "x" * 59),
    ],
)
def test_who_owns_an_address(address: str, whose: str) -> None:
    """A host has a whole /64 of IPv6; an address that is none is a short name."""
    assert network(address) == whose


async def test_of_many_lines_of_a_kind_a_few_are_told_and_the_rest_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the minute and kind; a minute with few of them ends without a word."""
    ends: list[Callable[[], None]] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda _, call, *given: ends.append(partial(call, *given)))
    told: list[tuple[str, dict[str, object]]] = []
    sparing = Sparing(lambda event, **fields: told.append((event, fields)), 2)
    for _ in range(5):
        sparing.tell("a", code="x")
    for code in ("y", "y"):
        sparing.tell("a", code=code)
    assert told == [("a", {"code": "x"})] * 2 + [("a", {"code": "y"})] * 2
    told.clear()
    for end in ends:
        end()
    assert told == [("a", {"code": "x", "held_back": 3})]
    sparing.tell("a", code="x")
    assert told[1:] == [("a", {"code": "x"})] and len(ends) == 3
