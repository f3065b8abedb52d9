"""A service that is killed outright takes its engine with it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from faults.process import serving

pytestmark = [pytest.mark.engine, pytest.mark.subprocess, pytest.mark.timeout(240)]


def is_alive(pid: int) -> bool:
    """Whether it runs: one that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_engine_outlives_its_service(state_folder: Path, tmp_path: Path) -> None:
    """SIGKILL, as the kernel sends it where memory runs out: nothing of the service can act on it."""
    variables = {"YAP_TEXT_STATE_DIR": str(state_folder), "YAP_TEXT_DEVICE": "cpu", "DEPLOY_MODELS": "chat"}
    with serving(tmp_path / "output", ("-m", "yaptext", "serve"), "a-key", **variables) as process:
        process.wait_ready()
        children = Path(f"/proc/{process.popen.pid}/task").glob("*/children")
        engines = [int(pid) for listed in children for pid in listed.read_text().split()]
        engines = [pid for pid in engines if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(engines) == 1
    until = time.monotonic() + 20
    while any(map(is_alive, engines)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(map(is_alive, engines))
