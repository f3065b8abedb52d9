"""A cable that is pulled: the client is gone, and no packet says so. Network namespaces, so it needs root and `ip`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzz.target import target
from privileged import NET_ADMIN, SYS_ADMIN, require

SERVER, CLIENT = "198.18.77.1", "198.18.77.2"
PING_S = 1.0
pytestmark = pytest.mark.subprocess


@pytest.fixture
def cable() -> Iterator[tuple[str, Callable[[], None]]]:
    """A namespace with a cable to this host, and what pulls it."""
    require(NET_ADMIN, SYS_ADMIN)
    if shutil.which("ip") is None:
        pytest.skip("needs ip")
    name = f"yap{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{SERVER}/30", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "addr", "add", f"{CLIENT}/30", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        yield name, lambda: ip("-n", name, "link", "set", "eth0", "down")
    finally:
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
        ip("netns", "del", name)


CODE = """
import sys, time
from fuzz.target import Client
client = Client(int(sys.argv[1]), host=sys.argv[2], key="a-key")
if sys.argv[3] == "streams":
    client.say("start", session_id="s", user_utterance="flood", sampling={"max_tokens": 4096})
print("there", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("what", ["waits", "streams"])
def test_a_pulled_cable_frees_its_slot(tmp_path: Path, cable: tuple[str, Callable[[], None]], what: str) -> None:
    """Within twice PING_INTERVAL_S, whether the client was silent or had megabytes on their way."""
    namespace, pull = cable
    with target(tmp_path, HOST=SERVER, YAP_TEXT_API_KEY="a-key", PING_INTERVAL_S=PING_S, SEND_QUEUE_BYTES=10**9) as aim:
        there = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-c", CODE, str(aim.port), SERVER, what],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
        )
        assert there.stdout is not None
        with there, there.stdout:
            assert there.stdout.readline() == b"there\n"
            assert aim.inside()["connections"] == 1
            pull()
            begun = time.monotonic()
            while aim.inside()["connections"]:
                assert time.monotonic() - begun < 5 * PING_S
                time.sleep(0.05)
            print(f"\n{what}: free after {time.monotonic() - begun:.2f} s")
            there.kill()
        assert [line["reason"] for line in aim.lines("connection.closed")] == ["disconnected"]
        assert not aim.complaints()
