"""soak/crowd.py as it is run by hand, for as long as a test run has time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from soak import crowd


@pytest.mark.subprocess
def test_a_crowd_leaves_the_front_end_as_it_was(tmp_path: Path) -> None:
    """200 users who barge in, cancel, vanish and come back: no task, file or stream is left, and memory stays. (Real
    vLLM has its crowd in tests/commands/test_main.py.)"""
    options = ("--minutes", "0.4", "--sockets", "200", "--rate", "20", "--json", str(tmp_path / "found.json"))
    ended = subprocess.run(
        [sys.executable, crowd.__file__, "front", *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["turns"]["gone"] > 100 and max(sample["connections"] for sample in found["samples"]) >= 190
