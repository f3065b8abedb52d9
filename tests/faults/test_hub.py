"""The hub does not answer: what is in the cache serves, without waiting for each file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from yaptext.engine import offline
from yaptext.engine.model_config import read_config
from yaptext.errors import StartError
from yaptext.settings import Settings

MODELS = {"CHAT_MODEL": "acme/yap", "TOOL_MODEL": "acme/yap"}


@contextmanager
def hub(answer: bytes | None) -> Iterator[str]:
    """Answers each request alike, or never."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if answer is None:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            return

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub client that is on line, with a cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(offline, "HUB_TIMEOUT_S", 60)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.mark.parametrize(
    ("answer", "is_down"), [(b"200 OK", False), (b"401 Unauthorized", False), (b"503 Unavailable", True), (None, True)]
)
def test_a_hub_that_does_not_answer_is_left(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, is_down: bool
) -> None:
    """By this process and, through the environment, by the engines'; whatever it answers for itself it is asked."""
    if answer is None:
        monkeypatch.setattr(offline, "HUB_TIMEOUT_S", 0.2)
    with hub(answer) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        offline.leave_hub_if_down(Settings.load(**MODELS))
    assert constants.HF_HUB_OFFLINE is is_down
    assert os.environ["HF_HUB_OFFLINE"] == str(int(is_down))


def test_a_closed_port_and_a_name_that_is_not_known_are_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the timeout."""
    for address in ("http://127.0.0.1:9", "http://hub.invalid"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        offline.leave_hub_if_down(Settings.load(**MODELS))
        assert constants.HF_HUB_OFFLINE, address


@pytest.mark.parametrize("models", [{}, {"CHAT_MODEL": "/some/folder", "TOOL_MODEL": "./other"}])
def test_without_a_hub_model_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch, models: dict[str, str]) -> None:
    """Folders and the demo model need no network."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    offline.leave_hub_if_down(Settings.load(**models))
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.subprocess
def test_without_hub_and_cache_the_start_ends_with_one_line(tmp_path: Path) -> None:
    """And with status 75, for which systemd tries again."""
    environment = os.environ | MODELS | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment |= {"LOG_LEVEL": "error", "HF_HUB_OFFLINE": "0", "YAP_TEXT_STATE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "yaptext", "serve"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 75
    assert "cannot read the config of acme/yap (CHAT_MODEL" in ended.stderr and ended.stderr.count("\n") == 1


def test_what_is_cached_is_found_and_what_is_not_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With one line, for which systemd tries again."""
    settings = Settings.load(**MODELS)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    offline.leave_hub_if_down(settings)
    with pytest.raises(StartError, match=r"config of acme/yap.*not in the cache, and the hub .* does not answer"):
        read_config(settings, "acme/yap")
    repository = tmp_path / "models--acme--yap"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    assert read_config(settings, "acme/yap") == {"max_position_embeddings": 77}
