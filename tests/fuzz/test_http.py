"""Random and mutated HTTP requests and handshakes against the service in its own process: a status that is no 500 or a
closed connection, no fault in the log, nothing leaked, and a sentinel that is served all the time.

`FUZZ_REQUESTS=100000` is the full run; without it a few thousand.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from fuzz.target import Client, target, watched
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "2000"))
STATUSES = {100, 101, 200, 400, 401, 403, 404, 405, 414, 426, 431, 503, 505}

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(900)]

METHODS = [b"GET"] * 30 + [
    b"HEAD",
    b"POST",
    b"PUT",
    b"DELETE",
    b"OPTIONS",
    b"CONNECT",
    b"PRI",
    b"get",
    b"",
    b"G\x00T",
    b"X" * 5000,
]
TARGETS = [
    b"/ws", b"/ws", b"/ws?api_key=yap_token", b"/healthz", b"/livez", b"/readyz", b"/status", b"/metrics",
    b"/asyncapi.json", b"/openapi.json", b"/docs", b"/v1/models", b"/v1/models/a%0ab", b"/v1/chat/completions",
    b"/playground/prompt",
    b"/", b"", b"*", b"/ws/", b"//ws", b"/%00", b"/%", b"/%ff%fe", b"/\xc3\xa9", b"/\xff", b"/ws\xe9",
    b"/../../etc/passwd",
    b"http://x/ws", b"http://[::1", b"x:99999/", b"/" + b"a" * 9000, b"/?" + b"a=b&" * 5000,
    b"/ws?api_key=" + b"%ff" * 999,
    b"/ws?api_key=yap_token&api_key=%00", b"/ws?api_key=\xff\xfe", b"/ws?" + b"&" * 4000, b"/ws?api_key",
    b"/ws#frag", b"/a b",
]  # fmt: skip
VERSIONS = [b"HTTP/1.1"] * 50 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/9.9", b"http/1.1", b"", b"HTTP/1.1 x"]
HANDSHAKE = [
    b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", b"X-API-Key: yap_token",
]  # fmt: skip
HEADERS = [
    *HANDSHAKE,
    b"Upgrade: h2c", b"Upgrade: WebSocket, x", b"upgrade:websocket", b"Connection: keep-alive, Upgrade",
    b"Connection: close",
    b"Sec-WebSocket-Version: 12", b"Sec-WebSocket-Version: x", b"Sec-WebSocket-Key: ", b"Sec-WebSocket-Key: \xff\xff",
    b"Sec-WebSocket-Key: AAAA", b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=99",
    b"Sec-WebSocket-Extensions: ;;;,,,=", b"Sec-WebSocket-Protocol: a, b,,\xe9", b"Sec-WebSocket-Protocol: ",
    b"Origin: null", b"Origin: \xff", b"Origin: http://a", b"Origin: http://b", b"Authorization: Bearer yap_token",
    b"Authorization: Bearer", b"Authorization: Basic \xff\xfe", b"X-API-Key: \xff\x80", b"X-API-Key: ",
    b"X-API-Key: wrong",
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 1, 2",
    b"Content-Length: 60000000", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked, x",
    b"Expect: 100-continue",
    b"Host: ", b"Host: a, b", b"Host: \xff", b": no-name", b"no colon", b"a b: c", b" folded: x", b"\tfolded",
    b"X: a\x00b",
    b"X: a\rb", b"X-Long: " + b"x" * 9000, b"X-Longer: " + b"x" * 70_000, b"Cookie: " + b"a=b; " * 1000, b"\xff: x",
]  # fmt: skip
BODIES = [b"", b"", b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\nx", b"-1\r\n\r\n", b"x" * 70_000]

_number = st.integers(0, 2**16)
requests = st.tuples(
    _number,
    _number,
    _number,
    st.booleans(),
    st.lists(_number, max_size=2),
    _number,
    st.none() | st.none() | st.none() | st.integers(0, 2**32),
)
Recipe = tuple[int, int, int, bool, list[int], int, int | None]


def build(recipe: Recipe) -> bytes:
    method, target, version, handshake, headers, body, damage = recipe
    chosen = (HANDSHAKE if handshake else []) + [HEADERS[n % len(HEADERS)] for n in headers]
    if damage is not None and damage % 11 == 0:
        chosen += [b"X-Many: %d" % n for n in range(200)]
    line = b" ".join(
        (METHODS[method % len(METHODS)], TARGETS[target % len(TARGETS)], VERSIONS[version % len(VERSIONS)])
    )
    data = b"\r\n".join((line, b"Host: localhost", *chosen, b"", BODIES[body % len(BODIES)]))
    if damage is None:
        return data
    chance, damaged = random.Random(damage), bytearray(data)
    for _ in range(chance.randint(0, 3)):
        at = chance.randrange(len(damaged))
        damaged[at : at + chance.randint(0, 2)] = bytes(chance.choices(range(256), k=chance.randint(0, 3)))
    end = chance.choice([len(damaged), len(damaged), chance.randrange(len(damaged))])
    return bytes(damaged[:end])


def test_no_request_harms_the_service(tmp_path: Path) -> None:
    """Whatever comes before a WebSocket is one: methods, paths, queries, headers, bodies, and several in a row."""
    found: Counter[int | str] = Counter()
    begun = time.monotonic()

    with target(tmp_path, MAX_CONCURRENT_CONNECTIONS=4, MAX_PENDING_HANDSHAKES=64) as aim:

        @settings(
            max_examples=REQUESTS // 2 // 2,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(st.lists(requests, min_size=1, max_size=3))
        def ask(recipes: list[Recipe]) -> None:
            client = Client(aim.port, upgrade=False)
            try:
                for recipe in recipes:
                    client.send(build(recipe))
                client.finish()
                answer = client.response()
            finally:
                client.close()
            statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+) ", answer, re.M)]
            assert not answer or statuses, answer
            assert set(statuses) <= STATUSES, statuses
            found.update(statuses or ["closed"])

        with watched(aim) as sentinel:
            ask()
            warm = aim.settled(connections=1)
            ask()
        after = aim.settled()
        print(
            f"\n{sum(found.values())} answers in {time.monotonic() - begun:.0f} s: {dict(found)}; {sentinel}; "
            f"{warm} -> {after}"
        )
        assert not aim.complaints()
        assert after["connections"] == 0
        assert after["tasks"] <= warm["tasks"] and after["files"] <= warm["files"]
        assert after["rss_mb"] < warm["rss_mb"] + 20
