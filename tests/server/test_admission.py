"""server/admission.py: how many connections there may be, and that no slot leaks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import pytest

from yaptext.engine.base import Load
from yaptext.errors import RateLimited, ServerAtCapacity
from yaptext.server.access.accounts import Account
from yaptext.server.access.keyfile import NO_LIMITS, Key, Limits
from yaptext.server.admission import Admission
from yaptext.wire.frames import Capacity

ACCOUNT = Account(Key("a", b"", NO_LIMITS))


def connection() -> Any:
    """Stands for a connection: only its identity matters here."""
    return cast(Any, object())


def test_capacity_counts_connections() -> None:
    """Active, the most, what is left, and whether that is nothing."""
    admission = Admission(2)
    assert admission.capacity == Capacity(active=0, max=2, available=2, at_capacity=False)
    with admission.slot(ACCOUNT, connection()):
        assert admission.capacity == Capacity(active=1, max=2, available=1, at_capacity=False)
        with admission.slot(ACCOUNT, connection()):
            assert admission.capacity == Capacity(active=2, max=2, available=0, at_capacity=True)
    assert admission.capacity.active == 0


def test_over_the_limit_there_is_no_slot() -> None:
    """The guide's words, and a hint when to come again; nothing changes for those that are in."""
    admission = Admission(1)
    first = connection()
    with admission.slot(ACCOUNT, first):
        with (
            pytest.raises(ServerAtCapacity, match=r"^Server is at capacity\.$") as caught,
            admission.slot(ACCOUNT, connection()),
        ):
            pytest.fail("there was no slot")
        assert caught.value.retry_after_ms
        assert list(admission.slots) == [first]
    with admission.slot(ACCOUNT, connection()):
        assert admission.capacity.at_capacity


def test_a_slot_is_free_again_whatever_happens() -> None:
    """A connection that fails leaves its slot like one that ends."""
    admission = Admission(1)
    for _ in range(3):
        with pytest.raises(RuntimeError), admission.slot(ACCOUNT, connection()):
            raise RuntimeError
    assert not len(admission.slots)


def test_connections_leave_in_any_order() -> None:
    """Each slot is its own."""
    admission = Admission(3)
    stacks = [ExitStack() for _ in range(3)]
    for stack in stacks:
        stack.enter_context(admission.slot(ACCOUNT, connection()))
    for index, left in ((1, 2), (0, 1), (2, 0)):
        stacks[index].close()
        assert admission.capacity.active == left


def test_a_key_has_so_many_connections() -> None:
    """A slot that is left is free, whatever happened in it; another key has its own."""
    admission = Admission(9)
    account, other = Account(Key("a", b"", Limits(connections=1))), Account(Key("b", b"", Limits(connections=1)))
    one, two = connection(), connection()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), admission.slot(account, one), admission.slot(other, two):
            with pytest.raises(RateLimited, match="the key a has 1 connections; limit is 1"):
                with admission.slot(account, connection()):
                    pytest.fail("there was no slot")
            assert list(admission.slots.of(account)) == [one] and set(admission.slots) == {one, two}
            raise ZeroDivisionError
    assert not len(admission.slots) and not admission.slots.of(account)


class Facts:
    """What an Admission is told, as attributes, and what it makes of it."""

    def __init__(self, limit: int = 100, *, floor: int = 3, max_backlog_ms: float = 2000, cache: int = 10_000) -> None:
        self.session_tokens = self.backlog_ms = self.time = 0.0
        self.admission = Admission(
            limit,
            floor=floor,
            max_backlog_ms=max_backlog_ms,
            load=lambda: Load(0, 0.0, 0, backlog_ms=self.backlog_ms),
            cache_tokens=cache,
            session_tokens=lambda: self.session_tokens,
            clock=lambda: self.time,
        )

    def admitted(self, wanted: int) -> int:
        """How many of so many sockets get a slot, one after the other."""
        with ExitStack() as stack:
            for number in range(wanted):
                try:
                    stack.enter_context(self.admission.slot(ACCOUNT, connection()))
                except ServerAtCapacity:
                    return number
            return wanted


@pytest.mark.parametrize(
    ("session_tokens", "cache", "admitted"),
    [(0, 10_000, 8), (500, 0, 8), (1000, 100_000, 8), (2000, 10_000, 5), (2001, 10_000, 4), (9000, 10_000, 3)],
)
def test_no_more_sessions_than_the_kv_cache_holds(session_tokens: float, cache: int, admitted: int) -> None:
    """Neither more than the limit, nor fewer than the floor, however large a turn was; unknown sizes refuse nobody."""
    facts = Facts(8, cache=cache)
    facts.session_tokens = session_tokens
    assert facts.admitted(10) == admitted


def test_the_cache_as_the_limit_is_told() -> None:
    """`max` is how many there may be now; sessions that have grown since leave nothing available."""
    facts = Facts(8)
    facts.session_tokens = 2000
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(facts.admission.slot(ACCOUNT, connection()))
        assert facts.admission.capacity == Capacity(5, 5, 0, True, "kv_cache")
        facts.session_tokens = 3000
        assert facts.admission.capacity == Capacity(5, 3, 0, True, "kv_cache")
        facts.session_tokens = 100
        assert facts.admission.capacity == Capacity(5, 8, 3, False)


def test_nobody_new_joins_a_long_queue_of_prompts() -> None:
    """Up to the limit they do; the first is never kept out by a queue that is none of a connection's."""
    facts = Facts()
    facts.backlog_ms = 2000.0
    assert facts.admitted(4) == 4
    facts.backlog_ms = 2000.1
    assert facts.admitted(4) == 1
    with facts.admission.slot(ACCOUNT, connection()):
        assert facts.admission.capacity == Capacity(1, 100, 0, True, "prefill")
    off = Facts(max_backlog_ms=0)
    off.backlog_ms = 1e9
    assert off.admitted(4) == 4


@pytest.mark.parametrize(("backlog_ms", "least", "most"), [(4000, 3000, 5000), (1e6, 30_000, 30_000)])
def test_a_queue_tells_how_long_it_is(backlog_ms: float, least: int, most: int) -> None:
    """A quarter more or less, so that not all come back at once."""
    facts = Facts()
    waits = []
    with facts.admission.slot(ACCOUNT, connection()):
        facts.backlog_ms = backlog_ms
        for _ in range(50):
            with pytest.raises(ServerAtCapacity) as caught, facts.admission.slot(ACCOUNT, connection()):
                pytest.fail("there was no slot")
            waits.append(caught.value.retry_after_ms or 0)
    assert least <= min(waits) and max(waits) <= most
    assert len(set(waits)) > 1 or least == most


@pytest.mark.parametrize(
    ("endings", "every_s", "expected_ms"),
    [(0, 1, 2000), (7, 8, 2000), (8, 8, 8000), (50, 5, 5000), (100, 0.001, 250), (9, 60, 30_000)],
)
def test_a_slot_is_awaited_as_long_as_they_last(endings: int, every_s: float, expected_ms: float) -> None:
    """The mean time between two ends, within bounds; 2 s where few have ended."""
    facts = Facts(1)
    for _ in range(endings):
        facts.time += every_s
        with facts.admission.slot(ACCOUNT, connection()):
            pass
    with (
        facts.admission.slot(ACCOUNT, connection()),
        pytest.raises(ServerAtCapacity) as caught,
        facts.admission.slot(ACCOUNT, connection()),
    ):
        pytest.fail("there was no slot")
    assert caught.value.retry_after_ms == pytest.approx(expected_ms, rel=0.26)
