"""SIGHUP while the service starts: a reload that has to wait, or the end of the terminal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from faults.process import serving

from yaptext.server.access import keyfile

pytestmark = pytest.mark.subprocess
ENGINE = (str(Path(__file__).with_name("process.py")),)


@pytest.fixture(autouse=True)
def no_nohup() -> Iterator[None]:
    """Children inherit an ignored signal, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_reload_during_the_start_is_done_after_it(tmp_path: Path) -> None:
    """Nothing ends, and the keys are those of the file as it is by then. A stop goes on, too."""
    opening, file = tmp_path / "opening", tmp_path / "keys"
    removed, _ = keyfile.add("removed", file)
    with serving(tmp_path / "output", ENGINE, "key", OPENING=str(opening), YAP_TEXT_KEY_FILE=str(file)) as process:
        until(opening.exists)
        process.popen.send_signal(signal.SIGHUP)
        file.unlink()
        added, _ = keyfile.add("added", file)
        process.popen.send_signal(signal.SIGHUP)
        opening.unlink()
        process.wait_ready()
        until(lambda: process.events("keys.loaded"))
        (loaded,) = process.events("keys.loaded")
        assert loaded["removed"] == ["removed"]
        with httpx.Client(base_url=process.http, trust_env=False) as client:
            for key, status in ((removed, 401), (added, 200)):
                assert client.get("/status", headers={"X-API-Key": key}).status_code == status
        process.popen.terminate()
        while process.popen.poll() is None:
            process.popen.send_signal(signal.SIGHUP)
            time.sleep(0.005)
        assert process.popen.returncode == 0


def test_without_keys_or_a_supervisor_the_terminal_has_gone(tmp_path: Path) -> None:
    """Nobody could want a reload then."""
    opening = tmp_path / "opening"
    with serving(tmp_path / "output", ENGINE, "key", OPENING=str(opening)) as process:
        until(opening.exists)
        process.popen.send_signal(signal.SIGHUP)
        assert process.popen.wait(20) == -signal.SIGHUP


@pytest.mark.parametrize(("command", "status"), [("serve", 0), ("chat", -signal.SIGHUP)])
def test_serve_holds_it_back_before_anything_else(command: str, status: int) -> None:
    """Before the imports of the command line, which take half a second; the other commands do not."""
    code = (
        "import os, signal, sys, types; sys.modules['yaptext.commands.main'] = types.SimpleNamespace("
        "run=lambda _: os.kill(os.getpid(), signal.SIGHUP) or 0);"
        f"sys.argv[1:] = [{command!r}]; from yaptext.__main__ import main; main()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == status
