"""`yap-text` as its user meets it: its own process, its exit status, its lines."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import journal
import pytest
from soak.crowd import Soak, report
from websockets import ConnectionClosed
from websockets.sync.client import connect

from yaptext.observe.expected import EXPECTED
from yaptext.settings.table import variables

pytestmark = pytest.mark.subprocess
KEY = "a-key-of-the-test"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "yaptext", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_every_variable() -> None:
    """Name, default and meaning, as SETTINGS.md has them."""
    text = re.sub(r"\s+", " ", run("serve", "--help").stdout)
    for name, default, meaning in variables():
        assert f" {name}" + (f" (default {default})" if default else "") in text
        assert re.sub(r"\s+", " ", meaning) in text


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"CHAT_GPU_FRAC": "1.5"}, "CHAT_GPU_FRAC='1.5' is not allowed"),
        ({"DEPLOY_MODELS": "all"}, "DEPLOY_MODELS='all' is not allowed"),
        ({"HOST": "0.0.0.0"}, "HOST='0.0.0.0' is not allowed with the default API key"),
        ({"CHAT_MODEL": "/nowhere", "TOOL_MODEL": "/nowhere"}, "/nowhere is not a folder"),
        ({"CHAT_MODEL": "/nowhere"}, "TOOL_MODEL is not set"),
        ({"TOOLS_FILE": "/nowhere.json"}, "TOOLS_FILE"),
        ({"YAP_TEXT_KEY_FILE": "/nowhere"}, "YAP_TEXT_KEY_FILE='/nowhere' cannot be read"),
        ({"DEFAULT_PERSONA_STYLE": "nobody"}, "DEFAULT_PERSONA_STYLE='nobody' is not allowed: known are chill"),
    ],
)
def test_a_bad_setting_ends_the_start_with_one_line(environment: dict[str, str], told: str) -> None:
    """No traceback: the line names variable and value. Status 2: no later try would find it otherwise."""
    ended = run("serve", LOG_LEVEL="error", **environment)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and told in ended.stderr, ended.stderr


def test_the_app_imports_neither_vllm_nor_torch() -> None:
    """`import yaptext.server.app` stays light; the engine's imports happen where it opens."""
    code = "import sys, yaptext.server.app; print([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_client_without_a_service_says_so_in_one_line() -> None:
    """`warmup` against a closed port."""
    ended = run("warmup", "--url", "ws://127.0.0.1:9/ws")
    assert ended.returncode == 1 and "cannot connect" in ended.stderr and ended.stderr.count("\n") == 1


def test_a_new_key_is_printed_once_and_its_hash_is_kept(tmp_path: Path) -> None:
    """The key alone on stdout, for a pipe; the file from an option or the environment, or the line on stderr."""
    file = tmp_path / "keys"
    by_option = run("key", "new", "a", "--file", str(file))
    by_variable = run("key", "new", "b", YAP_TEXT_KEY_FILE=str(file))
    without = run("key", "new", "c")
    for made in (by_option, by_variable, without):
        assert (
            made.returncode == 0
            and re.fullmatch(r"yap_[\w-]{43}\n", made.stdout)
            and made.stdout[:-1] not in made.stderr
        )
    assert [line.split()[0] for line in file.read_text().splitlines()] == ["a", "b"]
    assert re.search(r": c sha256:[0-9a-f]{64}\n$", without.stderr)
    taken = run("key", "new", "a", "--file", str(file))
    assert taken.returncode == 2 and not taken.stdout and taken.stderr.count("\n") == 1


class Served:
    """A service in its own process, and its journal."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    def lines(self) -> list[str]:
        return journal.lines(self._log)

    def events(self, name: str) -> list[dict[str, Any]]:
        return journal.events(self._log, name)

    def ready(self) -> str:
        for _ in range(1200):
            assert self.process.poll() is None, "\n".join(self.lines()[-20:])
            if self.events("server.ready"):
                return str(self.events("server.ready")[0]["url"])
            time.sleep(0.1)
        raise AssertionError("not ready in two minutes")


@pytest.fixture(scope="module")
def served(state_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("serve") / "journal"
    environment = os.environ | {
        "PORT": "0",
        "YAP_TEXT_API_KEY": KEY,
        "YAP_TEXT_STATE_DIR": str(state_folder),
        "YAP_TEXT_DEVICE": "cpu",
        "LOG_FORMAT": "json",
        "KV_DTYPE": "auto",
        "HUGGINGFACE_HUB_TOKEN": "hf_test",
    }
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "yaptext", "serve"], env=environment, stderr=stderr)
    try:
        yield Served(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.mark.engine
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_the_start_ends_it_at_once(
    state_folder: Path, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    """With the signal's own status, no traceback, and no engine left behind."""
    log = tmp_path / "journal"
    environment = os.environ | {"PORT": "0", "YAP_TEXT_STATE_DIR": str(state_folder), "YAP_TEXT_DEVICE": "cpu"}
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "yaptext", "serve"], env=environment, stderr=stderr)
    starting = Served(process, log)
    try:
        while not starting.events("engine.opening"):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(sent)
        assert process.wait(60) == status
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()


@pytest.mark.engine
class TestServed:
    """One life of the service, in order: ready, talk, signals."""

    def test_it_says_what_it_serves(self, served: Served) -> None:
        """Demo, weights with their reason, moved names: one line each; every line is JSON."""
        served.ready()
        assert served.events("demo.serving") and served.events("weights.chosen")[0]["reason"]
        assert [e["note"] for e in served.events("setting.moved")] == ["HUGGINGFACE_HUB_TOKEN is now HF_TOKEN"]
        assert [line for line in served.lines() if not line.startswith("{")] == []

    def test_warmup_prints_figures_and_an_answer(self, served: Served) -> None:
        """One line of metrics, one of decision and text; options reach the service."""
        url = served.ready().replace("http", "ws") + "/ws"
        options = ("--url", url, "--gender", "woman", "--style", "scholar")
        ended = run("warmup", "What is the capital of France?", *options, YAP_TEXT_API_KEY=KEY)
        assert ended.returncode == 0, ended.stderr
        figures, result = map(json.loads, ended.stdout.splitlines())
        assert figures["metrics"]["ttft_ms"] > 0 and figures["metrics"]["usage"]["completion_tokens"] > 0
        assert "Paris" in result["text"] and result["toolcall"]["status"] in ("yes", "no")

    def test_chat_streams_and_ctrl_c_barges_in(self, served: Served) -> None:
        """In a terminal: the reply appears, Ctrl-C stops it and keeps the conversation, /quit leaves."""
        url = served.ready().replace("http", "ws") + "/ws"
        command = [sys.executable, "-m", "yaptext", "chat", "--url", url]
        master, slave = pty.openpty()
        process = subprocess.Popen(
            command,
            env=os.environ | {"YAP_TEXT_API_KEY": KEY},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            process_group=0,
        )
        os.close(slave)
        screen = ""

        def until(text: str) -> None:
            nonlocal screen
            while text not in screen:
                screen += os.read(master, 4096).decode(errors="replace")
            screen = screen.partition(text)[2]

        until("you>")
        os.write(master, b"Tell me a very long story about the sea and a ship.\n")
        until("[tool: none")
        until("]")
        until(" ")
        process.send_signal(signal.SIGINT)
        until("[cancelled after")
        until("you>")
        os.write(master, b"/quit\n")
        assert process.wait(20) == 0
        os.close(master)

    def test_no_key_and_no_utterance_is_in_the_journal(self, served: Served) -> None:
        """Not even one that came in an address."""
        url = served.ready().replace("http", "ws") + "/ws"
        turns = len(served.events("turn.finished"))
        with connect(f"{url}?api_key={KEY}", proxy=None) as socket:
            socket.send(json.dumps({"type": "start", "session_id": "s", "user_utterance": "canary words"}))
            while json.loads(socket.recv(60))["type"] != "done":
                pass
        while len(served.events("turn.finished")) == turns:  # its line comes after its done
            time.sleep(0.05)
        assert not [line for line in served.lines() if KEY in line or "canary" in line or "hf_test" in line]
        finished = served.events("turn.finished")[-1]
        assert finished["outcome"] == "finished" and finished["ttft_ms"] > 0 and finished["completion_tokens"] > 0

    async def test_a_crowd_leaves_it_as_it_was(self, served: Served) -> None:
        """8 users who barge in, cancel, vanish and come back: no task, file, request or KV block is left, and memory
        stays."""
        found = await Soak(served.ready().replace("http", "ws") + "/ws", KEY, served.process.pid, 8).run(30, 1.0)
        assert found["wrong"] == [] and found["turns"].get("gone"), report(found)

    def test_no_secret_reaches_an_engine_process(self, served: Served) -> None:
        """Nor is one seen of the service, as environment or argument. The hub client has its token from a file."""
        served.ready()
        own = served.process.pid
        children = [
            int(pid) for task in Path(f"/proc/{own}/task").iterdir() for pid in (task / "children").read_text().split()
        ]
        assert children, "the engine is a process of its own"
        for pid in (own, *children):
            for seen in (Path(f"/proc/{pid}/environ").read_bytes(), Path(f"/proc/{pid}/cmdline").read_bytes()):
                assert seen and KEY.encode() not in seen and b"hf_test" not in seen
        token_files = {
            Path(line.removeprefix(b"HF_TOKEN_PATH=").decode()).read_text()
            for pid in children
            for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if line.startswith(b"HF_TOKEN_PATH=")
        }
        assert token_files == {"hf_test"}

    def test_sigterm_drains_and_exits_with_zero(self, served: Served) -> None:
        """The open socket hears going_away with 1012; the journal tells of the drain; nothing is left."""
        url = served.ready().replace("http", "ws") + "/ws"
        with connect(url, additional_headers={"X-API-Key": KEY}, proxy=None) as socket:
            socket.send('{"type": "ping"}')
            assert json.loads(socket.recv(20))["type"] == "pong"
            served.process.send_signal(signal.SIGTERM)
            assert json.loads(socket.recv(20))["error_code"] == "going_away"
            with pytest.raises(ConnectionClosed, match="1012"):
                socket.recv(20)
        assert served.process.wait(30) == 0
        assert served.events("drain.finished")
        assert not [event for event in map(json.loads, served.lines()) if event["level"] in ("error", "critical")]

    def test_it_warned_only_of_what_an_operator_has_to_change(self, served: Served) -> None:
        """Of a variable with an old name, and of the demo model. A library's warning that is new either asks for
        something, or belongs into observe/expected.py."""
        assert served.process.poll() is not None, "the whole life is in the log"
        told = [event for event in map(json.loads, served.lines()) if event["level"] not in ("debug", "info")]
        assert [(event["event"], event["level"]) for event in told] == [
            ("setting.moved", "warning"),
            ("demo.serving", "warning"),
        ], told

    def test_an_expected_warning_is_no_line(self, served: Served) -> None:
        """Of vLLM, in both processes: a start's last lines are this service's."""
        told = [event["event"] for event in map(json.loads, served.lines())]
        expected = tuple(beginning for beginnings in EXPECTED.values() for beginning in beginnings)
        assert told and not [line for line in told if line.startswith(expected)]
