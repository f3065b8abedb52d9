"""server/access/tickets.py: each opens one door, once and soon."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yaptext.errors import RateLimited
from yaptext.server.access.accounts import Account
from yaptext.server.access.keyfile import NO_LIMITS, Key
from yaptext.server.access.tickets import PER_MINUTE, TTL_S, Tickets

KEY = b"k" * 32


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_ticket_works_once() -> None:
    """It stands for its key; the second time for nobody."""
    tickets = Tickets()
    first, second = tickets.issue(KEY), tickets.issue(b"other")
    assert tickets.redeem(first.encode()) == KEY
    assert tickets.redeem(first.encode()) is None
    assert tickets.redeem(second.encode()) == b"other" and len(tickets) == 0


@pytest.mark.parametrize(("seconds", "works"), [(TTL_S - 0.01, True), (TTL_S, False), (3600, False)])
def test_a_ticket_expires(seconds: float, works: bool) -> None:
    """After its minute it is like none."""
    clock = Clock()
    tickets = Tickets(clock)
    ticket = tickets.issue(KEY)
    clock.now = seconds
    assert (tickets.redeem(ticket.encode()) == KEY) is works


@given(st.binary(max_size=60))
def test_no_other_bytes_are_a_ticket(forged: bytes) -> None:
    """Neither made up, nor random in the same form, nor those of another process."""
    tickets = Tickets()
    tickets.issue(KEY)
    for attempt in (forged, secrets.token_urlsafe(32).encode(), Tickets().issue(KEY).encode()):
        assert tickets.redeem(attempt) is None


def test_memory_is_bounded() -> None:
    """However fast a key asks and however long, what waits is two minutes' worth; what expired is dropped."""
    clock = Clock()
    tickets, account = Tickets(clock), Account(Key("a", KEY, NO_LIMITS), clock)
    most = refused = 0
    for _ in range(5 * PER_MINUTE):
        clock.now += 0.06
        for _ in range(2):
            try:
                account.spend("tickets")
                tickets.issue(KEY)
            except RateLimited:
                refused += 1
        most = max(most, len(tickets))
    assert refused > 0 and PER_MINUTE < most <= 2 * PER_MINUTE + 1
