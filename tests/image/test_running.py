"""The image of the CPU build, made and run (YAP_TEXT_IMAGE=1). Needs root, mmdebstrap, podman and crun."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from image.podman import Container, Podman

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/yap-text:serve-cpu"
KEY = "key-of-the-image-test"
GRACE_S = 45
"""What nix/README.md asks for: longer than DRAIN_TIMEOUT_S and the close of every engine."""

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("YAP_TEXT_IMAGE") != "1",
        reason="YAP_TEXT_IMAGE=1 builds the container image and runs it: 8 minutes and 12 GB of disk",
    ),
    pytest.mark.timeout(1800),
]

Run = Callable[..., tuple[Container, int]]


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """With the image loaded, of the working tree."""
    for program in ("mmdebstrap", "podman", "crun"):
        assert shutil.which(program), f"{program} is not installed"
    python = Path(sys.base_prefix) / "bin" / "python3"
    subprocess.run(
        [ROOT / "nix/image/build.sh"], env=os.environ | {"ENV": "serve-cpu", "PYTHON": str(python)}, check=True
    )
    with Podman.in_folder(Path(tempfile.mkdtemp(prefix="yap-text-podman.", dir="/var/tmp"))) as podman:
        podman("load", "--input", ROOT / "dist" / "yap-text-serve-cpu.oci.tar")
        yield podman


@pytest.fixture
def run(podman: Podman) -> Iterator[Run]:
    """Starts a container that listens on a free port of loopback; returns it, and the port."""
    started: list[Container] = []

    def start(*arguments: str | Path, command: tuple[str, ...] = (), key: str = KEY) -> tuple[Container, int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = ["--env", f"PORT={port}", "--env", f"YAP_TEXT_API_KEY={key}"]
        container = podman.container(*settings, *arguments, image=IMAGE, command=command)
        started.append(container)
        return container, port

    yield start
    for container in started:
        container.remove()


def turn(port: int, session: str, utterance: str) -> str:
    """From outside, by this machine's own client: the reply."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "yaptext",
            "warmup",
            "--url",
            f"ws://127.0.0.1:{port}/ws",
            "--session",
            session,
            utterance,
        ],
        cwd=ROOT,
        env=os.environ | {"YAP_TEXT_API_KEY": KEY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout.splitlines()[-1])["text"])


async def cut(port: int, stop: Callable[[], Any]) -> tuple[list[dict[str, Any]], int | None, Any]:
    """`stop` is called in the middle of a reply: all frames, the code of the close, and what `stop` returned."""
    frames: list[dict[str, Any]] = []
    stopped: asyncio.Future[Any] | None = None
    async with websockets.connect(f"ws://127.0.0.1:{port}/ws", additional_headers={"X-API-Key": KEY}) as client:
        start = {"type": "start", "session_id": "kept", "user_utterance": "Tell me a long story about a dragon."}
        await client.send(json.dumps(start))
        try:
            async for text in client:
                frames.append(json.loads(text))
                if frames[-1]["type"] == "token" and stopped is None:
                    stopped = asyncio.get_running_loop().run_in_executor(None, stop)
        except websockets.ConnectionClosed:
            pass
    assert stopped is not None
    return frames, client.close_code, await stopped


def test_a_volume_keeps_model_and_sessions_and_a_stop_lets_a_reply_finish(run: Run, podman: Podman) -> None:
    """One container after another: the second finds what the first left, the demo model and the conversation."""
    podman("volume", "create", "kept")
    settings = ("--volume=kept:/data", "--env=SESSION_STORE=sqlite:sessions.db")
    first, port = run(*settings)
    cold_s = first.ready(port)
    assert "Paris" in turn(port, "kept", "What is the capital of France?")
    frames, code, (status, seconds) = asyncio.run(cut(port, lambda: first.stop(GRACE_S)))
    assert status == 0 and code == 1012
    assert [frame["type"] for frame in frames][-3:] == ["final", "done", "error"]
    assert frames[-2]["finish_reason"] in ("stop", "length") and frames[-1]["error_code"] == "going_away"
    assert '"turns_cut": 0' in first.logs()
    first.remove()

    second, port = run(*settings)
    warm_s = second.ready(port)
    print(f"ready after {cold_s:.0f} s, {warm_s:.0f} s from the second start; stopped in mid-reply in {seconds:.0f} s")
    assert '"sessions": 1' in next(line for line in second.logs().splitlines() if "sessions.restored" in line)
    assert second.sh("healthy") == '{"status":"ok"}\n'
    second.remove()
    podman("volume", "rm", "kept")


def test_any_user_on_a_read_only_root_without_rights_and_without_a_volume(run: Run) -> None:
    """As OpenShift runs it: a user id that no file knows, group 0, no capability. It writes to /data and /tmp alone."""
    hard = ("--read-only", "--tmpfs=/tmp", "--user=1234567890", "--cap-drop=all", "--security-opt=no-new-privileges")
    container, port = run(*hard)
    container.ready(port)
    assert "Paris" in turn(port, "any", "What is the capital of France?")
    assert container.sh("id -u; id -g; stat -c %u /data/state").split() == ["1234567890", "0", "1234567890"]
    written = container.sh("touch /opt/x /etc/x /x 2> /dev/null; ls -d /opt/x /etc/x /x 2> /dev/null; true")
    assert written == ""
    assert " 0 failed" in f" {container.sh('yap-text doctor --offline')}".replace("\n", " ")


def test_pid_1_hears_a_stop_at_once_and_leaves_no_zombies(run: Run) -> None:
    """Also a stop that comes before the service could hear it, and of processes that others left behind."""
    container, _ = run()
    status, seconds = container.stop(10)
    assert status in (0, 143) and seconds < 8

    container, _ = run()
    orphans = "for i in 1 2 3; do (sleep 0.2 &); done; sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status; true"
    assert container.sh(orphans) == ""


def test_without_a_key_it_ends_and_says_what_to_do(run: Run) -> None:
    """The key of a secret's file counts; the default key is served to nobody outside."""
    container, _ = run(key="")
    assert container.ended() == 2
    assert "HOST='0.0.0.0' is not allowed with the default API key: set YAP_TEXT_API_KEY" in container.logs()


def test_the_key_of_a_secret_counts(run: Run, tmp_path: Path) -> None:
    """A file below /run/secrets, where Docker, Podman and Compose put them, wins over the environment."""
    secret = tmp_path / "key"
    secret.write_text(KEY + "\n")
    secret.chmod(0o644)
    container, port = run(f"--volume={secret}:/run/secrets/YAP_TEXT_API_KEY:ro", key="")
    container.ready(port)
    assert '"sources": {"YAP_TEXT_API_KEY": "credential"' in container.logs()
    turn(port, "secret", "Hello")


def test_a_volume_of_another_user_is_named(run: Run, tmp_path: Path) -> None:
    container, _ = run(f"--volume={tmp_path}:/data")
    assert container.ended() == 2
    assert "YAP_TEXT_STATE_DIR='/data/state' is not allowed: it cannot be written to" in container.logs()


def test_nothing_of_the_machine_is_in_the_image(podman: Podman) -> None:
    """No registry, resolver, host name or configuration of pip; no file that runs as its owner or has a date."""
    script = """
    ls -d /etc/apt /etc/pip.conf /etc/xdg ~root/.config ~root/.cache /build 2> /dev/null
    find / -xdev \\( -perm /6000 -type f -o -newermt 1970-01-02 -path '/opt/*' \\) 2> /dev/null
    find / -xdev -type f -writable -not -path '/data/*' -not -path '/etc/*' 2> /dev/null
    true
    """
    usual = ["--rm", "--network=none", "--cgroups=disabled", "--ulimit=nofile=1024:4096", "--ulimit=nproc=4096:4096"]
    assert podman("run", *usual, "--entrypoint=sh", IMAGE, "-c", script) == ""
    image = json.loads(podman("image", "inspect", IMAGE))[0]
    assert image["User"] == "10001:0" and image["Config"]["StopSignal"] == "SIGTERM"
