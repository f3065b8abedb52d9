"""The faults of `faults.py`: those that are soon seen at each run, all with YAP_TEXT_ALL_FAULTS=1."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from systemd.faults import FAULTS, Fault, Scene, make, scene

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

MADE = [fault for fault in FAULTS if fault.is_quick or os.environ.get("YAP_TEXT_ALL_FAULTS") == "1"]


@pytest.fixture(scope="module")
def installed() -> Iterator[Scene]:
    with scene() as made:
        yield made


@pytest.mark.parametrize("fault", MADE, ids=lambda fault: fault.name)
def test_a_fault_is_told_and_can_be_mended(installed: Scene, fault: Fault) -> None:
    """In the status, the last lines of the journal and to a client; then the service starts again."""
    assert make(installed, fault) == []


def test_afterwards_it_serves_what_was_kept(installed: Scene) -> None:
    """All that was broken is mended, and the conversation from before the first fault goes on."""
    installed.wrong = []
    installed.serves()
    assert installed.wrong == []
