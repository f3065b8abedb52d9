"""bench/front_end.py: that each server which it measures serves what it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FRONT_END = Path(__file__).with_name("front_end.py")
SERVERS = ("engine", "websocket", "service", "http", "completions")


@pytest.mark.subprocess
def test_each_server_sends_every_token_in_time(tmp_path: Path) -> None:
    """Ten streams of 20 tokens a second, over WebSockets and over HTTP, with the service and without."""
    options = ("--sockets", "10", "--seconds", "1", "--patterns", "spread", "--servers", ",".join(SERVERS))
    ended = subprocess.run(
        [sys.executable, FRONT_END, *options, "--json", str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [each["server"] for each in found] == list(SERVERS)
    for each in found:
        # On a busy machine the tokens of the time before the first one count as well.
        assert each["tokens_per_s"] >= 150 and each["us_per_token"] > 0, each
