"""Clients that other people wrote, each in its own process, on a scripted engine and on real vLLM with the demo model.

A client knows a base URL and a key. The demo's words vary: these tests are about shapes and promises.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from clients.conftest import KEY, Target, client, scripted, step
from conftest import until
from fakes import Gate, Script

pytestmark = [pytest.mark.clients, pytest.mark.subprocess]
ON_SOCKETS = ("openai_socket", "openai_socket_async", "livekit_socket", "pipecat_socket")
"""Those that hold one for a conversation. What they do when it is refused or closed is in `test_sockets.py`."""
OVER_HTTP = ("openai", "openai_async", "litellm", "llm", "livekit", "pipecat")
OVER_HTTP += ("openai_responses", "openai_responses_async", "livekit_responses", "pipecat_responses")
CLIENTS = OVER_HTTP + ON_SOCKETS
each_client = pytest.mark.parametrize("name", CLIENTS)
each_over_http = pytest.mark.parametrize("name", OVER_HTTP)


@pytest.mark.parametrize("name", ["openai", "openai_async", "litellm"])
async def test_the_models_are_listed(name: str, target: Target, tmp_path: Path) -> None:
    """The roles and the personas; the official client also finds one by its name."""
    async with client(name, "models", target, tmp_path) as running:
        (told, _) = await running.end()
    assert {"chat", "tool", "persona/savage"} <= set(told["ids"])
    if name == "openai":
        assert (told["one"], told["persona"]) == ("chat", told["ids"][-1])


@each_client
async def test_a_conversation_of_two_turns(name: str, target: Target, tmp_path: Path) -> None:
    """Streamed, with usage; the second turn finds the first one's prompt in the cache."""
    async with client(name, "conversation", target, tmp_path) as running:
        first, second, _ = await running.end()
    for turn in (first, second):
        assert turn["text"].strip() and turn["pieces"] > 1
        assert turn["finish"] in ("stop", "length") and turn["usage"]
        assert target.engine is None or turn["text"] == "Hello there."
    assert second["cached"] > 0


@pytest.mark.parametrize(
    ("name", "parts"),
    [("openai", ("prompt_tokens", "completion_tokens")), ("openai_responses", ("input_tokens", "output_tokens"))],
)
async def test_an_answer_in_one_piece(name: str, parts: tuple[str, str], target: Target, tmp_path: Path) -> None:
    """With its usage."""
    async with client(name, "whole", target, tmp_path) as running:
        turn, _ = await running.end()
    assert turn["text"].strip()
    assert turn["usage"]["total_tokens"] == sum(turn["usage"][part] for part in parts)


@each_client
async def test_a_tool_call_its_result_and_the_answer(name: str, target: Target, tmp_path: Path) -> None:
    """With `tool_choice` required or the tool's name, which makes the demo call as well. `llm` cannot say it: there the
    scripted engine calls of itself, and the demo may not."""
    if target.engine is not None and name == "llm":
        assert target.engine.decision.calls is not None
        target.engine.decision = Script(target.engine.decision.calls)
    async with client(name, "tool", target, tmp_path) as running:
        await running.end()
    called = running.of("calls")
    assert called or (name == "llm" and target.engine is None)
    for told in called:
        assert told["finish"] == "tool_calls" and not told["text"]
        for identity, tool, arguments in told["calls"]:
            assert identity and tool == "get_weather" and set(json.loads(arguments)) == {"place"}
        assert told["calls"]
    (turn,) = running.of("turn")
    assert turn["text"].strip() and turn["finish"] in ("stop", "length")


@pytest.mark.parametrize("name", [name for name in CLIENTS if name != "livekit_socket"])
async def test_a_barge_in_ends_the_turn_within_a_second(name: str, target: Target, tmp_path: Path) -> None:
    """The client ends the stream in its own way (`llm` by Ctrl-C, Pipecat's socket by a cancel); the engine aborts, and
    the next turn is answered."""
    if target.engine is not None:
        target.engine.chat = Script((" word",) * 3000, pace=step)  # half a minute
    before = len(target.finished())
    async with client(name, "barge_in", target, tmp_path) as running:
        closed = await running.until("closed")
        began = time.monotonic()
        assert closed["heard"].strip()
        async with asyncio.timeout(1):
            while await target.running():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        idle_ms = 1000 * (time.monotonic() - began)
        if target.engine is not None:
            assert target.engine.aborted == 1
            target.engine.chat = Script(pace=step)
        else:
            await until(lambda: len(target.finished()) > before)
            last = target.finished()[-1]
            outcome = "cancelled" if name == "pipecat_socket" else "disconnected"
            assert (last["outcome"], last["finish_reason"]) == (outcome, None)
            running.add(f"The engine is idle after {idle_ms:.0f} ms; it made {last['completion_tokens']} tokens.")
        running.go_on()
        await running.end()
    (turn,) = running.of("turn")
    assert turn["text"].strip()


REFUSED = {
    "openai": "openai.AuthenticationError",
    "openai_async": "openai.AuthenticationError",
    "openai_responses": "openai.AuthenticationError",
    "openai_responses_async": "openai.AuthenticationError",
    "litellm": "litellm.exceptions.AuthenticationError",
    "llm": "openai.AuthenticationError",
    "livekit": "livekit.agents._exceptions.APIStatusError",
    "livekit_responses": "livekit.agents._exceptions.APIStatusError",
    "pipecat": "openai.AuthenticationError",
    "pipecat_responses": "openai.AuthenticationError",
}


@each_over_http
async def test_a_wrong_key_is_the_clients_own_error(name: str, tmp_path: Path) -> None:
    """At once: no client tries again."""
    async with scripted() as target:
        async with client(name, "failing", target, tmp_path, key="wrong") as running:
            await running.end()
        assert target.engine is not None and target.engine.running == 0
    (error,) = running.of("error")
    assert REFUSED[name] in error["kinds"]
    assert error["status"] == 401


@asynccontextmanager
async def full() -> AsyncIterator[tuple[Target, Gate]]:
    """A service whose only slot a stream holds until the gate lets it go on."""
    gate = Gate()
    async with scripted(MAX_CONCURRENT_CONNECTIONS=1) as target:
        assert target.engine is not None
        target.engine.chat = Script(pace=gate)
        body = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "hi"}]}

        async def hold() -> None:
            async with httpx.AsyncClient(headers={"X-API-Key": KEY}, timeout=120, trust_env=False) as holder:
                await holder.post(f"{target.http}/v1/chat/completions", json=body)

        holding = asyncio.create_task(hold())
        await until(lambda: gate.waiting == 1)
        yield target, gate
        gate.step(100)  # the watch asks an engine that is silent for long, which takes steps as well
        await holding


FULL = {
    "openai": "openai.InternalServerError",
    "openai_async": "openai.InternalServerError",
    "openai_responses": "openai.InternalServerError",
    "openai_responses_async": "openai.InternalServerError",
    "litellm": "litellm.exceptions.ServiceUnavailableError",
    "llm": "openai.InternalServerError",
    "livekit": "livekit.agents._exceptions.APIConnectionError",
    "livekit_responses": "livekit.agents._exceptions.APIConnectionError",
    "pipecat": "openai.InternalServerError",
    "pipecat_responses": "openai.InternalServerError",
}


@each_over_http
async def test_overload_is_the_clients_own_error_after_its_retries(name: str, tmp_path: Path) -> None:
    """503, which asks for 1.5 to 2.5 s. Those who use OpenAI's client wait that long, instead of its own 0.5 s; LiveKit
    keeps to 0.1 s."""
    async with full() as (target, _):
        refused_at = []

        async def watch() -> None:
            for count in (1, 2):
                await until(lambda count=count: target.refused() >= count)
                refused_at.append(time.monotonic())

        watching = asyncio.create_task(watch())
        async with client(name, "failing", target, tmp_path) as running:
            await running.end()
        await watching
        assert target.refused() == (3 if name in {"pipecat", "pipecat_responses", "llm"} else 2)
        assert target.engine is not None and target.engine.running in (1, 2), "the stream, and perhaps the watch"
    (error,) = running.of("error")
    assert FULL[name] in error["kinds"]
    assert error["status"] == 503 or "status_code=503" in error["text"]
    between_s = refused_at[1] - refused_at[0]
    print(f"{name} waited {between_s:.2f} s")
    assert (between_s >= 1.5) == (not name.startswith("livekit"))


@pytest.mark.parametrize("name", ["openai", "openai_responses"])
async def test_a_client_that_meets_a_full_service_is_answered_by_its_own_retry(name: str, tmp_path: Path) -> None:
    """As soon as the time is over that it was asked to wait, if there is a slot by then."""
    async with full() as (target, gate):
        async with client(name, "waiting", target, tmp_path) as running:
            await running.until("asking")
            await asyncio.sleep(0.3)
            assert target.engine is not None
            target.engine.chat = Script(pace=step)
            gate.step(3)
            began = time.monotonic()
            await running.end()
            assert time.monotonic() - began < 10
    (turn,) = running.of("turn")
    assert turn["text"] == "Hello there."


@pytest.mark.parametrize("name", ["livekit", "livekit_responses"])
async def test_a_reply_that_is_late_outlives_livekits_patience(name: str, tmp_path: Path) -> None:
    """LiveKit gives up on a stream that is silent for 10 s, and asks again: keepalives prevent both."""
    late = asyncio.Event()

    async def pace() -> None:
        if not late.is_set():
            late.set()
            await asyncio.sleep(11)

    async with scripted() as target:
        assert target.engine is not None
        target.engine.chat = Script(pace=pace)
        async with client(name, "conversation", target, tmp_path) as running:
            await running.end()
        assert late.is_set() and target.engine.aborted == 0
    assert [turn["text"] for turn in running.of("turn")] == ["Hello there."] * 2
