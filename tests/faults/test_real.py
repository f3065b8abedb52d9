"""One life of the service on real vLLM: a start without the hub, requests that are poison, too little KV memory, a
clock that jumps, and an engine that dies with people's words in its hands. In this order, on one engine."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Frame, check_frames
from faults.plant import Plant
from faults.process import Process, say, serving, turn, until
from faults.test_privacy import KEY, TEXTS, answers

pytestmark = [pytest.mark.engine, pytest.mark.subprocess, pytest.mark.timeout(600)]
QUIET = {"tools": [], "history_text": "", "persona_text": "Be brief."}


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return Plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture(scope="module")
def served(plant: Plant, state_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The demo model as a hub model that is in the cache, no hub, and KV memory for 1,400 tokens, or 2,800."""
    from yaptext.engine import demo

    home = tmp_path_factory.mktemp("home")
    repository = home / "hub" / "models--acme--yap"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(demo.folder(state_folder), target_is_directory=True)
    variables = plant.environment | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "YAP_TEXT_STATE_DIR": str(home),
        "CHAT_MODEL": "acme/yap",
        "TOOL_MODEL": "acme/yap",
        "YAP_TEXT_DEVICE": "cpu",
        "CHAT_TEMPERATURE": "0",
        "CPU_KV_CACHE_MB": "64",
        "CHAT_MAX_MODEL_LEN": "1024",
        "LOG_LEVEL": "debug",
        "VLLM_LOGGING_LEVEL": "DEBUG",
    }
    with serving(home / "output", ("-m", "yaptext", "serve"), KEY, **variables) as process:
        process.wait_ready()
        yield process


def test_the_cache_serves_where_the_hub_is_down(served: Process) -> None:
    """After one line about it, and under the hub's name of the model."""
    (down,) = served.events("hub.down")
    assert down["level"] == "warning" and down["failure"] == "ConnectError"
    with served.connect() as socket:
        frames = turn(socket, "What is the capital of France?", **QUIET)
    check_frames(frames)
    assert frames[0]["models"] == {"chat": "acme/yap", "tool": "acme/yap"}


PARAMETERS: dict[str, Any] = {
    "an unknown type": {"type": "canary-type"},
    "a reference to nowhere": {"$ref": "#/$defs/canary"},
    "a reference in a circle": {"$ref": "#/properties/a"},
    "an empty range": {"type": "integer", "minimum": 5, "maximum": 1},
    "a huge range": {"type": "integer", "minimum": -1e308, "maximum": 1e308},
    "nothing allowed": False,
    "an empty choice": {"enum": []},
    "a string longer than all": {"type": "string", "minLength": 10**9},
    "a list longer than all": {"type": "array", "items": {"type": "string"}, "minItems": 10**6},
    "more parts than parts": {"type": "object", "minProperties": 5, "maxProperties": 2},
    "control characters": {"const": '\x00"\\\ud7ff'},
}


REFUSED = {
    "an unknown type", "a reference to nowhere", "a reference in a circle", "an empty range", "a huge range",
    "nothing allowed", "an empty choice", "more parts than parts",
}  # fmt: skip


@pytest.mark.parametrize("what", PARAMETERS)
def test_a_poisoned_tool_fails_alone(served: Process, what: str) -> None:
    """What no grammar can be made of is refused by the tool's name. Else its turn gets its decision, with a reason if
    the engine could make none, and its reply; so does one beside."""
    schema = {"type": "object", "properties": {"a": PARAMETERS[what]}, "required": ["a"]}
    tool = {"name": "poison", "description": "canary-description", "parameters": schema}
    with served.connect() as socket, served.connect() as other:
        say(other, "start", session_id="other", user_utterance="hi", **QUIET, sampling={"max_tokens": 4})
        frames = turn(socket, "Take the poison", **QUIET | {"tools": [tool], "sampling": {"max_tokens": 2}})
        check_frames(frames)
        if what in REFUSED:
            assert [frame["error_code"] for frame in frames] == ["bad_message"] and "'poison'" in frames[0]["message"]
        else:
            decision = frames[1]
            assert frames[-1]["type"] == "done" and decision["type"] == "toolcall"
            assert decision.get("reason") in (None, "engine_failed", "truncated", "invalid")
        assert until(other, "done", "error")[-1]["type"] == "done"
    assert served.events("turn.finished")[-1]["outcome"] == "finished"


@pytest.mark.parametrize(
    "sampling",
    [
        {"seed": 2**63 - 1},
        {"temperature": 5e-324, "top_p": 5e-324},
        {"temperature": 2, "top_k": 1000, "min_p": 1},
        {"repetition_penalty": 0.1, "presence_penalty": -2, "frequency_penalty": -2},
        {"stop": ["\x00", "é", "🏴\U000e0067", "\u200d", "\uffff"]},
        {"stop": ["a", "e", "i", "o", "u", " ", "t", "n"]},
    ],
)
def test_sampling_at_its_bounds_is_answered(served: Process, sampling: dict[str, Any]) -> None:
    """What the protocol allows the engine survives."""
    with served.connect() as socket:
        frames = turn(socket, "hi", **QUIET, sampling=sampling | {"max_tokens": 3})
    assert frames[-1]["type"] == "done", frames


@pytest.mark.parametrize(
    "utterance",
    ["\x00\x00", "\ufeff\u202e" + "\u200d" * 300, "🏴\U000e0067" * 60, "<|im_end|>" * 50, "\uffff\ufffe"],
)
def test_odd_text_is_answered(served: Process, utterance: str) -> None:
    """Whatever Unicode allows; half a surrogate pair is no JSON."""
    with served.connect() as socket:
        assert turn(socket, utterance, **QUIET, sampling={"max_tokens": 2})[-1]["type"] == "done"
        socket.send(r'{"type": "start", "session_id": "s", "user_utterance": "\ud83d"}')
        assert until(socket, "error")[-1]["error_code"] == "bad_message"


def test_a_prompt_over_the_context_fails_alone(served: Process) -> None:
    """With its size and the limit."""
    with served.connect() as socket:
        error = turn(socket, "hi", **QUIET | {"persona_text": "word " * 1200})[-1]
        assert error["error_code"] == "text_too_long" and "limit is 1023" in error["message"]
        assert turn(socket, "hi", **QUIET, sampling={"max_tokens": 2})[-1]["type"] == "done"


def test_too_little_kv_memory_is_latency_and_no_error(served: Process, plant: Plant) -> None:
    """Turns of 400 tokens that do not fit side by side: some are preempted, all finish."""
    headers = {"X-API-Key": KEY}
    (engine,) = httpx.get(f"{served.http}/status", headers=headers, trust_env=False).json()["engines"].values()
    room = engine["kv_tokens"]  # by the CPU: of half precision twice as many
    ended: list[Frame] = []

    def talk(number: int) -> None:
        history = "\n".join(f"User: {number} and {n}?\nAssistant: {number + n}." for n in range(48))
        with served.connect() as socket:
            fields = QUIET | {"session_id": f"kv-{number}", "history_text": history, "sampling": {"max_tokens": 60}}
            ended.append(turn(socket, "Tell me a long story.", **fields)[-1])

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(room // 350)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [end["type"] for end in ended] == ["done"] * len(threads), ended
    assert plant.preempted > 0, [end["usage"] for end in ended]


@pytest.mark.parametrize("jump_s", [86_400 * 365, -86_400 * 365])
def test_a_jump_of_the_clock_is_not_felt(served: Process, plant: Plant, jump_s: int) -> None:
    """In the engine's process, between two tokens."""
    with served.connect() as socket:
        say(socket, "start", session_id="s", user_utterance="Tell me a story.", **QUIET, sampling={"max_tokens": 20})
        until(socket, "token")
        plant.switch(f"clock {jump_s}")
        assert until(socket, "done", "error")[-1]["type"] == "done"
        assert turn(socket, "And then?", sampling={"max_tokens": 5})[-1]["type"] == "done"
        plant.switch("")


def test_an_engine_that_dies_takes_the_service_along_and_tells_nothing(served: Process, plant: Plant) -> None:
    """Its last words hold the requests of the failed step: none of them is written, nor is anything that was said
    before. The turns hear `engine_failed`, and the process ends within two seconds."""
    with served.connect() as socket, served.connect() as quiet:
        turn(socket, "canary-utterance", **TEXTS | {"sampling": {"stop": ["canary-stop"], "max_tokens": 4}})
        told = answers(served)
        fields = TEXTS | {"tools": [], "sampling": {"stop": ["canary-stop"], "max_tokens": 150}}
        say(socket, "start", session_id="s", user_utterance="canary-utterance, tell me a story", **fields)
        until(socket, "token")
        children = Path(f"/proc/{served.popen.pid}/task/{served.popen.pid}/children").read_text().split()
        engines = [Path("/proc", pid) for pid in children]
        told += "".join((engine / "cmdline").read_text() for engine in engines)
        for engine in engines:
            assert re.search(r"Max core file size +[01] ", (engine / "limits").read_text())
        plant.switch("raise canary-exception")
        begun = time.monotonic()
        error = until(socket, "done", "error")[-1]
        assert error["error_code"] == "engine_failed" and error["turn"] > 1
        assert until(quiet, "error")[-1]["error_code"] == "going_away"
        assert served.popen.wait(20) == 1
        took = time.monotonic() - begun
    assert took < 2, took
    assert engines
    for engine in engines:
        with suppress(FileNotFoundError, ProcessLookupError):
            while "State:\tZ" not in (engine / "status").read_text():  # whoever adopted it may not have reaped it yet
                assert time.monotonic() - begun < 10, engine
    output = served.output
    assert [line for line in (output + told).splitlines() if "canary" in line] == []
    for expected in ("RuntimeError", "engine.died", "tool_reason"):
        assert expected in output
