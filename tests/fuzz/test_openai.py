"""Random and mutated bodies and frames against OpenAI's doors of the service in its own process: each is answered, no
fault is logged, nothing is left, and a sentinel on `/ws` is served all the time.

`FUZZ_FRAMES=100000` is the full run; without it a few thousand.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fuzz.frames import Recipe, fatal, mild, payload, recipes
from fuzz.target import TEXT, Client, Target, frame, target, watched
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

FRAMES = int(os.environ.get("FUZZ_FRAMES", "5000"))
A_SOCKET = 20
"""Frames of one socket, about."""
CODES = {1000, 1001, 1002, 1007, 1008, 1009}
"""What the service itself may close a damaged socket with."""
STATUSES = {200, 400, 404}
_MARK = frame(TEXT, b'{"type":"the-mark"}')
_TOOL = {"name": "look", "description": "Looks.", "parameters": {
    "type": "object", "properties": {"at": {"type": "string"}, "n": {"anyOf": [{"type": "integer"}]}},
    "required": ["at"]}}  # fmt: skip
_CALL = {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"at": "x"}'}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
RESPONSES: list[dict[str, Any]] = [
    {"input": "What is the capital of France?"},
    {"model": "chat", "instructions": "You are Ada.", "store": False, "user": "u", "metadata": {"session_id": "s"},
     "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, {"type": "reasoning"}, _CALL,
               {"type": "function_call_output", "call_id": "1", "output": "4 degrees"}],
     "tools": [{"type": "function"} | _TOOL], "tool_choice": {"type": "function", "name": "look"}, "top_p": 0.5,
     "temperature": 0.5, "max_output_tokens": 5, "parallel_tool_calls": False, "prompt_cache_key": "k"},
    {"input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}}},
    {"input": "hi", "previous_response_id": "resp_1"},
    {"input": "hi", "tools": [{"type": "function"} | _TOOL], "tool_choice": "required"},
]  # fmt: skip
CREATES = [
    *({"type": "response.create"} | body for body in RESPONSES),
    {"type": "response.create", "input": "hi", "generate": False},
    {"type": "response.cancel"},
    {"type": "response.cancel", "response_id": "resp_1"},
]
_MESSAGES = [{"role": "system", "content": "You are Ada."}, {"role": "user", "content": "hi"}]
_CALLED = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}]}  # fmt: skip
CHATS: list[dict[str, Any]] = [
    {"messages": _MESSAGES},
    {"messages": [*_MESSAGES, _CALLED, {"role": "tool", "tool_call_id": "1", "content": "4 degrees"}],
     "model": "chat", "user": "u", "metadata": {"session_id": "s"}, "tools": [{"type": "function", "function": _TOOL}],
     "tool_choice": "auto", "stop": ["x"], "n": 1, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1,
     "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "max_tokens": 5, "seed": 1},
    {"messages": _MESSAGES, "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}},
    {"messages": _MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "logprobs": False},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_completion_tokens": 5},
]  # fmt: skip

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(900)]
examples = settings(
    max_examples=FRAMES // A_SOCKET // 2,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)
many = st.lists(recipes, min_size=A_SOCKET - 10, max_size=A_SOCKET + 10)


@pytest.fixture
def aim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target(
        tmp_path_factory.mktemp("fuzz"), MAX_FRAME_BYTES=262_144, MAX_SESSIONS=100, MAX_CONCURRENT_CONNECTIONS=8
    ) as aim:
        yield aim


def check(aim: Target, warm: dict[str, float]) -> None:
    after = aim.settled()
    assert not aim.complaints()
    assert after["connections"] == after["running"] == 0
    assert after["tasks"] <= warm["tasks"] and after["files"] <= warm["files"]
    assert after["sessions"] <= 101
    assert after["rss_mb"] < warm["rss_mb"] + 40


def test_no_frame_of_the_responses_socket_harms_the_service(aim: Target) -> None:
    """Each is answered; events are numbered without a gap, up to a close for a client that does not read."""
    codes: Counter[int | None] = Counter()
    kinds: Counter[str] = Counter()

    @examples
    @given(many, st.none() | recipes, st.integers(0, 2**16))
    def converse(opening: list[Recipe], last: Recipe | None, cut: int) -> None:
        client = Client(aim.port, path="/v1/responses")
        try:
            # What is no UTF-8 closes the socket: only the last of them is damaged.
            whole = [(how, base, edits, None) for how, base, edits, _ in opening[:-1]]
            client.send(b"".join(mild(recipe, CREATES) for recipe in [*whole, opening[-1]]) + _MARK)
            marked, numbers = False, []

            def read(event: dict[str, Any]) -> bool:
                """Whether it is the answer to the mark."""
                kinds[event["type"]] += 1
                numbers.append(event["sequence_number"])
                if event["type"] != "error":
                    return False
                assert event["status"] not in (500, 503) or event["error"]["code"] in ("slow_client", "going_away"), (
                    event
                )
                return "the-mark" in event["error"]["message"]

            marked = any(map(read, client.messages()))
            assert marked or client.close_code in CODES, client.close_code
            if marked:
                rest = mild(opening[0], CREATES)
                client.send((fatal(last) if last else b"") + rest[: cut % len(rest)])
                client.finish()
                for event in client.messages():
                    read(event)
            assert client.over
            assert numbers == list(range(len(numbers))) or client.close_code == 1008
            codes[client.close_code] += 1
        finally:
            client.close()

    begun = time.monotonic()
    with watched(aim) as sentinel:
        converse()
        warm = aim.settled(connections=1)
        converse()
    print(f"\nin {time.monotonic() - begun:.0f} s; closes {dict(codes)}; {dict(kinds)}; {sentinel}")
    assert kinds["response.completed"] > 20 and kinds["error"] > 100
    check(aim, warm)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_no_body_harms_the_service(aim: Target, path: str) -> None:
    bases = CHATS if "chat" in path else RESPONSES
    found: Counter[int] = Counter()

    @examples
    @given(st.lists(recipes, min_size=8, max_size=12))
    def ask(given_recipes: list[Recipe]) -> None:
        for _, *rest in given_recipes:
            body = payload(*rest, bases)
            client = Client(aim.port, upgrade=False)
            try:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: yap_token\r\nConnection: close\r\n"
                client.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                answer = client.response()
            finally:
                client.close()
            status = re.match(rb"HTTP/1\.1 (\d+) ", answer)
            assert status is not None, answer[:200]
            found[int(status[1])] += 1
            assert int(status[1]) in STATUSES, (answer[:500], body[:500])

    begun = time.monotonic()
    with watched(aim) as sentinel:
        ask()
        warm = aim.settled(connections=1)
        ask()
    print(f"\n{found.total()} answers in {time.monotonic() - begun:.0f} s: {dict(found)}; {sentinel}")
    assert found[200] > 50 and found[400] > 50
    check(aim, warm)
