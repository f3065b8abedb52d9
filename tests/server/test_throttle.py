"""server/access/throttle.py: rates, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import pytest

from yaptext.server.access.sparing import Shown, Sparing, shown
from yaptext.server.access.throttle import Bucket, Throttle, network


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


class Log:
    """What a Sparing told, and the ends of its ten seconds, which a test calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[dict[str, object]] = []
        self._ends: list[Callable[[], None]] = []
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_later", lambda _, call, *given: self._ends.append(partial(call, *given)))

    def write(self, event: str, **fields: object) -> None:
        self.told.append({"event": event, **fields})

    def ten_seconds_pass(self) -> list[dict[str, object]]:
        """What is told at their end."""
        self.told.clear()
        ends, self._ends = self._ends, []
        for end in ends:
            end()
        return self.told

    @property
    def remembered(self) -> int:
        return len(self._ends)


async def test_of_many_lines_of_an_address_one_is_told_and_the_rest_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once, then a line every ten seconds while there are more; other addresses and kinds have theirs."""
    log = Log(monkeypatch)
    sparing = Sparing(log.write)
    for _ in range(5):
        sparing.tell("a", "192.0.2.1", code="x")
    sparing.tell("a", "192.0.2.200", code="x")
    sparing.tell("a", "192.0.2.1", code="y")
    sparing.tell("a", "198.51.100.1", code="x")
    first = {"event": "a", "address": "192.0.2.0/24", "code": "x", "count": 1}
    assert log.told == [first, first | {"code": "y"}, first | {"address": "198.51.100.0/24"}]
    assert log.ten_seconds_pass() == [first | {"count": 5}]
    sparing.tell("a", "192.0.2.1", code="x")
    sparing.tell("a", "192.0.2.1", code="x")
    assert log.ten_seconds_pass() == [first | {"count": 2}]
    assert log.ten_seconds_pass() == [] and log.remembered == 0


async def test_a_flood_from_many_addresses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the log nor the memory grows with them; an address that is told apart stays so while it goes on."""
    log = Log(monkeypatch)
    sparing = Sparing(log.write, "whole", most=32)
    for number in range(10_000):
        sparing.tell("a", f"10.0.{number >> 8}.{number & 255}", code="x")
    assert len(log.told) == log.remembered == 33 and log.told[-1]["address"] == "others"
    for number in range(10_000):
        sparing.tell("a", f"10.0.{number >> 8}.{number & 255}", code="x")
    told = log.ten_seconds_pass()
    assert len(told) == 33
    assert {line["address"]: line["count"] for line in told}["others"] == 2 * (10_000 - 32) - 1


@pytest.mark.parametrize(
    ("address", "whole", "truncated"),
    [
        ("192.0.2.1", "192.0.2.1", "192.0.2.0/24"),
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::1", "fe80::/48"),
        ("", "unknown", "unknown"),
        ('192.0.2.1", "forged', "unknown", "unknown"),
    ],
)
async def test_an_address_is_shown_as_the_operator_wants(address: str, whole: str, truncated: str) -> None:
    """What is no address is not repeated."""
    expected: dict[Shown, str | None] = {"whole": whole, "truncated": truncated, "none": None}
    for how, line in expected.items():
        assert shown(address, how) == line
        told: list[dict[str, object]] = []
        Sparing(lambda event, told=told, **fields: told.append(fields), how).tell("a", address)
        assert told == [{"count": 1} if line is None else {"address": line, "count": 1}]
