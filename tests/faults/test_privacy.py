"""Nothing that people say, and no key, in anything that is written: marked words are sent in every way there is."""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from faults.process import Process, say, serving, turn, until
from websockets import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

pytestmark = pytest.mark.subprocess

ENGINE = (str(Path(__file__).with_name("process.py")),)
KEY = "canary-key"
CALL = {"name": "note", "arguments": {"text": "canary-argument"}}
VARIABLES = {
    "LOG_LEVEL": "debug",
    "PYTHONASYNCIODEBUG": "1",
    "REPLY": "canary-reply to you.",
    "DECISION": json.dumps([CALL], separators=(",", ":")),
}
TEXTS: dict[str, Any] = {
    "persona_text": "canary-persona",
    "history_text": "User: canary-history\nAssistant: canary-answer",
    "tools": [
        {
            "name": "note",
            "description": "canary-description",
            "parameters": {"type": "object", "properties": {"text": {"const": "canary-argument"}}},
            "examples": [{"message": "canary-example", "arguments": {"text": "canary-argument"}}],
        }
    ],
    "sampling": {"stop": ["canary-stop"]},
}
START = {"type": "start", "session_id": "s", "user_utterance": "x"}
BAD_TOOLS = (
    {"name": "canary name"},
    {"name": "n", "parameters": {"type": "canary-type"}},
    {"name": "n", "parameters": {"type": "object", "properties": {"a": {"$ref": "canary-reference"}}}},
    {"name": "n", "examples": [{"message": ["canary-example"]}]},
)
BAD_FRAMES = (
    "canary-frame",
    '{"type": "canary-type"}',
    '{"canary-field": "canary-value"',
    json.dumps(START | {"assistant_gender": "canary-gender"}),
    json.dumps(START | {"persona_style": "canary-style"}),
    json.dumps(START | {"user_utterance": ["canary-utterance"]}),
    json.dumps({"type": "set_persona", "persona_text": "canary-persona " * 5000}),
    *(json.dumps(START | {"tools": [tool]}) for tool in BAD_TOOLS),
)


def socket_to(process: Process) -> socket.socket:
    host, _, port = process.http[7:].partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def send_raw(process: Process, head: int, payload: bytes) -> None:
    """One frame as bytes, whatever is in it; waits for an error frame, or the end of the connection."""
    request = f"GET /ws?api_key={KEY} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with socket_to(process) as client:
        client.sendall((request + key).encode())
        assert b" 101 " in client.recv(4096)
        client.sendall(struct.pack("!BBH4x", head, 0x80 | 126, len(payload)) + payload)  # masked with zeros
        with suppress(ConnectionResetError):
            while (answer := client.recv(65536)) and b'"error"' not in answer:
                pass


def say_everything(process: Process) -> None:
    """Every message, every kind of error, every way to fail that a client can cause."""
    with process.connect() as socket:
        assert turn(socket, "canary-utterance", **TEXTS)[-1]["finish_reason"] == "stop"
        say(socket, "set_persona", persona_text="canary-persona")
        say(socket, "warm_persona", persona_text="canary-persona")
        say(socket, "warm_history", history_text="User: canary-history")
        say(socket, "ping")
        until(socket, "warmed")
        until(socket, "warmed")
        for frame in BAD_FRAMES:
            socket.send(frame)
            message = until(socket, "error")[-1]["message"]
            # An unknown type is quoted to the client that sent it, and nowhere else.
            assert "canary" not in message or message.startswith("Unknown type 'canary-type'; known are"), frame
        for order in ("FAIL", "DECIDE FAIL", "ASYNCIO", "THREAD", "MISLOG"):
            turn(socket, f"canary-utterance {order}", **TEXTS)
    for order in ("CRASH", "DECIDE CRASH"):
        with process.connect() as socket:
            assert "canary" not in turn(socket, f"canary-utterance {order}", **TEXTS)[-1]["message"]
    send_raw(process, 0x81, b'{"type": "canary-bytes \xff\xfe"}')
    send_raw(process, 0xF1, b"canary-reserved-bits")
    send_raw(process, 0x80, b"canary-continuation")
    for query in (f"api_key={KEY}", "api_key=canary-wrong", "api%5Fkey=canary-wrong", "API_KEY=canary-wrong"):
        with suppress(ConnectionClosed), connect(f"ws{process.http[4:]}/ws?{query}", proxy=None) as socket:
            say(socket, "end")
            until(socket, "none")
    with socket_to(process) as client:
        client.sendall(b"canary-nonsense\r\n\r\n")
        client.recv(4096)


SCHEMA = {"type": "object", "properties": {"text": {"const": "canary-argument"}}}
TOOL = {"name": "note", "description": "canary-description", "parameters": SCHEMA}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "canary-persona"},
        {"role": "user", "content": "canary-history"},
        {"role": "assistant", "content": "canary-answer"},
    ],
    "user": "canary@example.com",
    "metadata": {"canary-name": "canary-value"},
    "stop": ["canary-stop"],
}
BAD_BODIES: tuple[dict[str, Any], ...] = (
    {"canary-field": "canary-value"},
    {"model": "canary-model", "messages": [{"role": "user", "content": "hi"}], "input": "hi"},
    {"messages": [{"role": "canary-role"}], "input": [{"type": "canary-type"}]},
    {"messages": ["canary"], "input": ["canary"], "stop": "canary " * 5000},
    {"messages": [{"role": "user", "content": "canary " * 5000}], "input": "canary " * 5000},
    {"messages": [{"role": "user", "content": "hi"}], "input": "hi", "tools": [{"name": "canary name"}]},
    {"input": "hi", "previous_response_id": "canary-id", "conversation": "canary"},
)


def say_everything_to_openai(process: Process) -> None:
    """The same, in the words of OpenAI's clients: streamed, whole, and on a socket."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=process.http, trust_env=False, headers=headers, timeout=60) as client:

        def post(path: str, body: dict[str, Any]) -> None:
            with suppress(httpx.RemoteProtocolError):  # a fault in the middle of a stream
                client.post(path, json=body)

        for order in ("", "FAIL", "DECIDE FAIL", "CRASH", "DECIDE CRASH"):
            said = {"role": "user", "content": f"canary-utterance {order}"}
            for more in ({}, {"stream": True}, {"tools": [{"type": "function", "function": TOOL}]}):
                post("/v1/chat/completions", CHAT | {"messages": [*CHAT["messages"], said]} | more)
                flat = {"tools": [{"type": "function"} | TOOL]} if "tools" in more else more
                post("/v1/responses", CHAT | {"instructions": "canary-persona", "input": [said]} | flat)
        for body in BAD_BODIES:
            for path in ("/v1/chat/completions", "/v1/responses"):
                post(path, body)
        client.post("/v1/responses", content=b'{"input": "canary-bytes \xff\xfe"}')
        client.get("/v1/models/canary-model")
    for order in ("", "FAIL", "CRASH"):
        with connect(f"ws{process.http[4:]}/v1/responses?model=chat", additional_headers=headers, proxy=None) as socket:
            socket.send("canary-frame")
            for body in (*BAD_BODIES, CHAT | {"input": f"canary-utterance {order}"}):
                socket.send(json.dumps({"type": "response.create"} | body))
            with suppress(ConnectionClosed):
                until(socket, "response.completed", "response.failed")
    for query in (f"api_key={KEY}", "api_key=canary-wrong"):
        with suppress(ConnectionClosed, InvalidStatus):
            with connect(f"ws{process.http[4:]}/v1/responses?{query}&model=canary", proxy=None) as socket:
                say(socket, "response.create", input="canary")
                until(socket, "error")


def answers(process: Process) -> str:
    """What the HTTP routes say, with the key in each of its places."""
    with httpx.Client(base_url=process.http, trust_env=False) as client:
        told = [client.get(path, headers={"X-API-Key": KEY}).text for path in ("/status", "/metrics", "/healthz")]
        told += [client.get("/status", params={"api_key": key}).text for key in (KEY, "canary-wrong")]
        told += [client.get("/canary-path", headers={"Authorization": "Bearer canary-bearer"}).text]
    return "\n".join(told)


@pytest.mark.parametrize("format", ["json", "console"])
def test_no_word_and_no_key_is_written_anywhere(tmp_path: Path, format: str) -> None:
    """Not to stderr, not to the log file, metrics, status or arguments, at the lowest level, through faults and the
    engine's death. What is logged instead names the type and the place."""
    log = tmp_path / "log"
    variables = VARIABLES | {"LOG_FORMAT": format, "YAP_TEXT_LOG_FILE": str(log)}
    with serving(tmp_path / "output", ENGINE, KEY, **variables) as process:
        process.wait_ready()
        say_everything(process)
        say_everything_to_openai(process)
        told = answers(process) + Path(f"/proc/{process.popen.pid}/cmdline").read_text()
        with process.connect() as socket:
            assert turn(socket, "canary-utterance DIE", **TEXTS)[-1]["error_code"] == "engine_failed"
        assert process.popen.wait(20) == 1
        output = process.output
    told += output + log.read_text()
    assert [line for line in told.splitlines() if "canary" in line] == []
    for expected in ("turn.crashed", "KeyError", "ExceptionGroup", "process.py", "log.failed", "engine.died"):
        assert expected in output, expected
    assert output.count("turn.crashed") > 10 < output.count("turn.finished"), "on every door"
    assert output.count("thread.crashed") == 2 and "Task exception was never retrieved" in output
    assert "UnicodeDecodeError" not in output, "a client's fault is no traceback"


def test_log_text_says_so_and_logs_what_was_said(tmp_path: Path) -> None:
    """Utterance, decision and reply of each turn at info, after a warning at the start; the key stays hidden."""
    with serving(tmp_path / "output", ENGINE, KEY, **VARIABLES, LOG_TEXT="1") as process:
        process.wait_ready()
        with process.connect() as socket:
            turn(socket, "canary-utterance", **TEXTS)
            turn(socket, "canary-utterance CRASH", **TEXTS)
        (warning,), (said, _) = process.events("text.logged"), process.events("turn.text")
        assert warning["level"] == "warning" and "LOG_TEXT=1" in warning["hint"]
        assert process.output.index("text.logged") < process.output.index("server.ready")
        assert said["level"] == "info" and said["utterance"] == "canary-utterance"
        assert (said["decision"], said["reply"]) == ([CALL], "canary-replytoyou.")
        assert "canary-utterance CRASH" in process.events("turn.crashed")[0]["exception"][0]["exc_value"]
        assert KEY not in process.output


def test_a_crash_leaves_no_core_file(tmp_path: Path) -> None:
    """Though whoever started it would allow one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        control = subprocess.Popen(["sleep", "60"], cwd=tmp_path)
        control.send_signal(signal.SIGSEGV)
        control.wait()
        left = [file.name for file in tmp_path.glob("core*")]
        if not left:
            pytest.skip(f"no core file here: limit {hard}, {Path('/proc/sys/kernel/core_pattern').read_text()!r}")
        with serving(tmp_path / "output", ENGINE, KEY, **VARIABLES) as process:
            process.wait_ready()
            process.popen.send_signal(signal.SIGSEGV)
            assert process.popen.wait(20) == -signal.SIGSEGV
        assert [file.name for file in tmp_path.glob("core*")] == left
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
