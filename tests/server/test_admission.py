"""server/admission.py: how many connections there may be, and that no slot leaks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import pytest

from yaptext.errors import ServerAtCapacity
from yaptext.server.admission import Admission
from yaptext.wire.messages import Capacity


def connection() -> Any:
    """Stands for a connection: only its identity matters here."""
    return cast(Any, object())


def test_capacity_counts_connections() -> None:
    """Active, the most, what is left, and whether that is nothing."""
    admission = Admission(2)
    assert admission.capacity == Capacity(active=0, max=2, available=2, at_capacity=False)
    with admission.slot(connection()):
        assert admission.capacity == Capacity(active=1, max=2, available=1, at_capacity=False)
        with admission.slot(connection()):
            assert admission.capacity == Capacity(active=2, max=2, available=0, at_capacity=True)
    assert admission.capacity.active == 0


def test_over_the_limit_there_is_no_slot() -> None:
    """The guide's words, and a hint when to come again; nothing changes for those that are in."""
    admission = Admission(1)
    first = connection()
    with admission.slot(first):
        with (
            pytest.raises(ServerAtCapacity, match=r"^Server is at capacity\.$") as caught,
            admission.slot(connection()),
        ):
            pytest.fail("there was no slot")
        assert caught.value.retry_after_ms
        assert admission.connections == {first}
    with admission.slot(connection()):
        assert admission.capacity.at_capacity


def test_a_slot_is_free_again_whatever_happens() -> None:
    """A connection that fails leaves its slot like one that ends."""
    admission = Admission(1)
    for _ in range(3):
        with pytest.raises(RuntimeError), admission.slot(connection()):
            raise RuntimeError
    assert admission.connections == set()


def test_connections_leave_in_any_order() -> None:
    """Each slot is its own."""
    admission = Admission(3)
    stacks = [ExitStack() for _ in range(3)]
    for stack in stacks:
        stack.enter_context(admission.slot(connection()))
    for index, left in ((1, 2), (0, 1), (2, 0)):
        stacks[index].close()
        assert admission.capacity.active == left
