"""Folders that are full or cannot be written, as real file systems of a few pages (needs root)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import fill
from faults.process import say, serving, turn, until
from privileged import tmpfs

Mount = Callable[[str, str], Path]
ENGINE = (str(Path(__file__).with_name("process.py")),)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with ExitStack() as stack:

        def mount(name: str, options: str) -> Path:
            return stack.enter_context(tmpfs(tmp_path / name, options))

        yield mount


@pytest.mark.subprocess
def test_a_full_log_file_costs_its_lines_and_nothing_else(tmp_path: Path, mount: Mount) -> None:
    """Turns go on, stderr has every line and says that the file has not; with room again the file goes on, too, and no
    line of it is half a line."""
    disk = mount("logs", "size=64k")
    with serving(tmp_path / "output", ENGINE, "key", YAP_TEXT_LOG_FILE=str(disk / "log")) as process:
        process.wait_ready()
        with process.connect() as socket:
            turn(socket, "before")
            ballast = fill(disk)
            for _ in range(50):
                assert turn(socket, "while")[-1]["type"] == "done"
            assert len(process.events("log.file_failed")) in (1, 2)
            ballast.unlink()
            while len(process.events("log.file_again")) < len(process.events("log.file_failed")):
                turn(socket, "after")
        process.popen.terminate()
        process.popen.wait(20)
    lines = process.output.splitlines()
    assert [line for line in lines if not line.startswith("{")] == [], "no traceback"
    failed, lost = process.events("log.file_failed")[0], sum(e["lines_lost"] for e in process.events("log.file_again"))
    assert failed["level"] == "error" and "No space left on device" in failed["error"]
    kept = [json.loads(line) for line in (disk / "log").read_text().splitlines()]
    assert len(process.events("turn.finished")) > 51
    assert 0 < lost == len(lines) - len(kept)


@pytest.mark.subprocess
def test_a_log_folder_that_goes_away_is_told_once(tmp_path: Path) -> None:
    """As a rotation gone wrong leaves it; the service goes on."""
    folder = tmp_path / "logs"
    folder.mkdir()
    with serving(tmp_path / "output", ENGINE, "key", YAP_TEXT_LOG_FILE=str(folder / "log")) as process:
        process.wait_ready()
        with process.connect() as socket:
            folder.rename(tmp_path / "away")
            assert all(turn(socket, "hi")[-1]["type"] == "done" for _ in range(3))
            folder.mkdir()
            while not process.events("log.file_again"):
                turn(socket, "hi")
    assert len(process.events("log.file_failed")) == len(process.events("log.file_again")) == 1
    assert "Traceback" not in process.output


@pytest.mark.subprocess
def test_a_full_stderr_ends_no_turn(tmp_path: Path, mount: Mount) -> None:
    """Where the log itself goes to a full disk there is nobody to tell, and nothing to stop for."""
    disk = mount("logs", "size=64k")
    with serving(disk / "output", ENGINE, "key") as process:
        process.wait_ready()
        with process.connect() as socket:
            fill(disk)
            assert all(turn(socket, "hi")[-1]["type"] == "done" for _ in range(100))
    assert "Traceback" not in process.output


@pytest.mark.subprocess
@pytest.mark.parametrize("killed", [False, True])
def test_a_restart_on_a_full_disk_finds_kept_sessions(tmp_path: Path, mount: Mount, killed: bool) -> None:
    """Of a service that was stopped or killed. What is said meanwhile is written when there is room again."""
    disk = mount("state", "size=512k")
    stored = {"SESSION_STORE": f"sqlite:{disk}/sessions.db"}
    with serving(tmp_path / "output", ENGINE, "key", **stored) as process:
        process.wait_ready()
        with process.connect() as socket:
            for number in range(5):
                turn(socket, "before", session_id=f"s{number}")
            say(socket, "forget", session_id="none")
            until(socket, "forgotten")  # what came before it is in the file
        process.popen.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
        process.popen.wait(60)
    ballast = fill(disk)
    with serving(tmp_path / "again", ENGINE, "key", **stored) as process:
        process.wait_ready()
        assert [event["sessions"] for event in process.events("sessions.restored")] == [5]
        assert not process.events("sessions.not_read")
        if not killed:  # what a killed process left beside the file may make room
            assert len(process.events("sessions.unsaved")) == 1
        with process.connect() as socket:
            for number in range(5):
                say(socket, "get_session", session_id=f"s{number}")
                assert until(socket, "session", "error")[-1]["history"][0]["content"] == "before"
            assert turn(socket, "more", session_id="s0")[-1]["turn"] == 2
            ballast.unlink()
            say(socket, "forget", session_id="s4")
            until(socket, "forgotten")  # that is, in the file


@pytest.mark.engine
@pytest.mark.parametrize(("options", "reason"), [("size=20m", "No space left"), ("ro", "Read-only file system")])
def test_a_state_folder_that_takes_no_model_is_one_line(mount: Mount, options: str, reason: str) -> None:
    """The start ends with status 75, for which systemd tries again; nothing half-made is left."""
    state = mount("state", options)
    ended = subprocess.run(
        [sys.executable, "-m", "yaptext", "serve"],
        env=os.environ | {"YAP_TEXT_STATE_DIR": str(state), "LOG_LEVEL": "error", "YAP_TEXT_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 75
    assert ended.stderr.count("\n") == 1 and "cannot write the demo model" in ended.stderr, ended.stderr
    assert reason in ended.stderr
    assert list(state.rglob("*.safetensors")) == []


def test_a_cache_that_cannot_be_written_is_replaced(monkeypatch: pytest.MonkeyPatch, mount: Mount) -> None:
    """By a folder that can, with a line; one that can be is kept, and is made where it is missing."""
    from yaptext.engine.vllm.environment import leave_fixed_caches

    fixed, free = mount("fixed", "ro"), mount("free", "size=64k")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(fixed / "vllm"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(fixed))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(free / "triton"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    leave_fixed_caches()
    for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        assert fixed not in Path(os.environ[name]).parents and os.access(os.environ[name], os.W_OK)
        Path(os.environ[name]).rmdir()
    assert os.environ["TRITON_CACHE_DIR"] == str(free / "triton") and (free / "triton").is_dir()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
