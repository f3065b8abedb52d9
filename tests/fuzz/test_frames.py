"""Random and mutated frames against the service in its own process: it answers or closes with a code of the protocol,
logs no fault, leaks nothing, and serves a sentinel all the time.

`FUZZ_FRAMES=100000` is the full run; without it a few thousand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from fuzz.frames import Recipe, fatal, mild, recipes
from fuzz.target import TEXT, Client, Target, frame, target, watched
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

FRAMES = int(os.environ.get("FUZZ_FRAMES", "5000"))
A_SOCKET = 40
"""Frames of one socket, about."""
CODES = {1000, 1002, 1007, 1009, 4000, 4001}
"""What the service itself may close a damaged socket with."""
_PING = frame(TEXT, b'{"type":"ping"}')

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def aim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target(
        tmp_path_factory.mktemp("fuzz"), MAX_FRAME_BYTES=262_144, MAX_SESSIONS=100, MAX_CONCURRENT_CONNECTIONS=8
    ) as aim:
        yield aim


def test_no_frame_harms_the_service(aim: Target) -> None:
    """Whatever one client sends, each of its sockets is answered or closed, and no other client notices."""
    sent, codes = 0, dict.fromkeys([*CODES, None], 0)
    begun = time.monotonic()

    @settings(
        max_examples=FRAMES // A_SOCKET // 2,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(
        st.lists(recipes, min_size=A_SOCKET - 10, max_size=A_SOCKET + 10), st.none() | recipes, st.integers(0, 2**16)
    )
    def converse(opening: list[Recipe], last: Recipe | None, cut: int) -> None:
        nonlocal sent
        client = Client(aim.port)
        try:
            client.send(b"".join(map(mild, opening)) + _PING)
            sent += len(opening) + 1
            answered = client.until("pong") is not None
            assert answered or client.close_code in CODES, f"closed with {client.close_code} and {client.errors}"
            if answered:
                rest = mild(opening[0])
                client.send((fatal(last) if last else b"") + rest[: cut % len(rest)])
                sent += 1 + (last is not None)
                client.finish()
                for _ in client.messages():
                    pass
            assert client.over
            assert not client.errors & {"internal", "engine_failed"}
            codes[client.close_code if client.close_code in CODES else None] += 1
        finally:
            client.close()

    with watched(aim) as sentinel:
        converse()
        warm = aim.settled(connections=1)
        converse()
    after = aim.settled()
    print(f"\n{sent} frames in {time.monotonic() - begun:.0f} s; closes {codes}; {sentinel}; {warm} -> {after}")
    assert not aim.complaints()
    assert after["connections"] == after["running"] == 0
    assert after["tasks"] <= warm["tasks"] and after["files"] <= warm["files"]
    assert after["sessions"] <= 101
    assert after["rss_mb"] < warm["rss_mb"] + 30
