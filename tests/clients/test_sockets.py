"""Clients that hold a socket of `/v1/responses`: what they do if it is refused or closed, how they leave a reply."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from clients.conftest import Target, client, scripted, step
from clients.test_clients import ON_SOCKETS, full
from conftest import until
from fakes import Script

pytestmark = [pytest.mark.clients, pytest.mark.subprocess]
each_client = pytest.mark.parametrize("name", ON_SOCKETS)


async def slowly() -> None:
    await asyncio.sleep(0.05)


LONG = Script((" word",) * 200, pace=slowly)
"""Ten seconds."""


def errors(target: Target, code: str) -> float:
    """Errors that the service has sent."""
    assert target.inside is not None
    metrics = target.inside.server.lifespan.state["service"].runtime.metrics
    return metrics.registry.get_sample_value("yaptext_errors_total", {"code": code}) or 0.0


def last_prompt(target: Target) -> str:
    assert target.engine is not None
    return target.engine.codec.show(target.engine.requests[-1][0])


# --- refused

REFUSED = {
    "openai_socket": "websockets.exceptions.InvalidStatus",
    "openai_socket_async": "websockets.exceptions.InvalidStatus",
    "livekit_socket": "livekit.agents._exceptions.APIConnectionError",
    "pipecat_socket": "websockets.exceptions.InvalidStatus",
}


@each_client
async def test_a_wrong_key_is_refused_at_the_handshake(name: str, tmp_path: Path) -> None:
    """The official client and Pipecat try once; LiveKit takes it for a lost connection and tries again."""
    async with scripted() as target:
        async with client(name, "failing", target, tmp_path, key="wrong") as running:
            await running.end()
        assert errors(target, "authentication_failed") == (2 if name == "livekit_socket" else 1)
    error = running.of("error")[0]
    assert REFUSED[name] in error["kinds"] and "401" in error["text"]
    if name.startswith("openai"):
        assert error["code"] == "invalid_api_key"


@each_client
async def test_overload_is_refused_at_the_handshake(name: str, tmp_path: Path) -> None:
    """The official client does not try again: its user reads `retry-after-ms`. LiveKit does after 0.1 s. Pipecat tries
    three times more, 4 s apart, and then never again."""
    tries = {"livekit_socket": 2, "pipecat_socket": 4}.get(name, 1)
    async with full() as (target, _):
        async with client(name, "failing", target, tmp_path) as running:
            await running.end()
        assert errors(target, "server_at_capacity") == tries
    error = running.of("error")[0]
    assert REFUSED[name] in error["kinds"] and "503" in error["text"]
    if name.startswith("openai"):
        assert error["code"] == "server_at_capacity" and 1500 <= int(error["wait"]) <= 2500


async def test_pipecat_that_meets_a_full_service_is_answered_by_its_own_retry(tmp_path: Path) -> None:
    """4 s later, if there is a slot by then."""
    async with full() as (target, gate):
        async with client("pipecat_socket", "failing", target, tmp_path) as running:
            await running.until("asking")
            await until(lambda: target.refused() == 2)
            assert target.engine is not None
            target.engine.chat = Script(pace=step)
            gate.step(3)
            await running.end()
    (turn,) = running.of("turn")
    assert turn["text"] == "Hello there."


@each_client
async def test_an_error_event_costs_a_turn_and_not_the_socket(name: str, tmp_path: Path) -> None:
    """Here 429. No client tries again: the official one has status, code and the time to wait, LiveKit and Pipecat the
    text alone."""
    keys = tmp_path / "keys"
    keys.write_text(f"a sha256:{hashlib.sha256(b'a').hexdigest()} turns_per_minute=1\n")
    keys.chmod(0o600)
    async with scripted(YAP_TEXT_KEY_FILE=str(keys)) as target:
        async with client(name, "closed", target, tmp_path, key="a") as running:
            await running.until("idle")
            running.go_on()
            await running.end()
        assert errors(target, "rate_limited") == (1 if name.startswith("openai") else 2), "the user's own second try"
    words = "the key a is out of turns; limit is 1 a minute"
    if name.startswith("openai"):
        (refused,) = running.of("refused")
        assert (refused["status"], refused["code"]) == (429, "rate_limit_exceeded")
        assert 50_000 < int(refused["headers"]["retry-after-ms"]) <= 60_000
    elif name == "livekit_socket":
        assert [words in error["text"] and error["status"] for error in running.of("error")] == [-1, -1]
    else:
        assert [error["text"] for error in running.of("failure")] == [f"WebSocket API error: {words}"] * 2


# --- closed


@each_client
async def test_a_restart_between_two_turns_loses_no_word(name: str, tmp_path: Path) -> None:
    """The socket closes with 1012, and the new service does not know the first response. The official client connects
    again if it reads and has a callback; its user sends the whole conversation after `previous_response_not_found`.
    Pipecat does both by itself. LiveKit needs `store=False`, with which it always sends the whole conversation."""
    scenario = "closed_unstored" if name == "livekit_socket" else "closed"
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(scripted())
        async with client(name, scenario, target, tmp_path) as running:
            await running.until("idle")
            target = await restarted(target, stack)
            running.go_on()
            await running.end()
        assert errors(target, "bad_message") == (0 if name == "livekit_socket" else 1)
        assert "capital of France?" in last_prompt(target) and "Hello there." in last_prompt(target)
    assert [turn["text"] for turn in running.of("turn")] == ["Hello there."] * 2
    if name == "openai_socket":
        assert "websockets.exceptions.ConnectionClosedError" in running.of("error")[0]["kinds"]
    if name == "openai_socket_async":
        assert running.of("reconnecting")[0]["code"] == 1012


async def test_livekit_that_stores_does_not_survive_a_restart(tmp_path: Path) -> None:
    """It names the last response of before in every turn: each fails."""
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(scripted())
        async with client("livekit_socket", "closed", target, tmp_path) as running:
            await running.until("idle")
            target = await restarted(target, stack)
            running.go_on()
            await running.end()
    assert ["not found" in error["text"] for error in running.of("error")] == [True, True]


async def restarted(target: Target, stack: AsyncExitStack) -> Target:
    """A new service on the port of a drained one."""
    assert target.inside is not None
    target.inside.server.begin_drain()
    assert target.inside.server.drained is not None
    await target.inside.server.drained
    await stack.aclose()
    return await stack.enter_async_context(scripted(PORT=int(target.http.rpartition(":")[2])))


@each_client
async def test_an_idle_socket_is_closed_and_the_next_turn_is_answered(name: str, tmp_path: Path) -> None:
    """With 1001. The service still has the last response, and the conversation continues it. Pipecat asks not to store:
    only its closed socket had the response, so it sends the whole conversation."""
    async with scripted(IDLE_TIMEOUT_S=1) as target:
        async with client(name, "closed", target, tmp_path) as running:
            await running.until("idle")
            if name == "openai_socket_async":
                await running.until("reconnecting")
            else:
                await until(lambda: target.inside is not None and not target.inside.active)
            running.go_on()
            await running.end()
        assert errors(target, "bad_message") == (name == "pipecat_socket")
        assert "capital of France?" in last_prompt(target) and "Hello there." in last_prompt(target)
    assert [turn["text"] for turn in running.of("turn")] == ["Hello there."] * 2
    if name == "openai_socket_async":
        assert running.of("reconnecting")[0]["code"] == 1001


# --- left in the middle, and prepared


async def test_a_warm_up_is_found_by_the_first_turn(tmp_path: Path) -> None:
    async with scripted() as target, client("openai_socket", "warm", target, tmp_path) as running:
        await running.end()
    (warmed,), (turn,) = running.of("warmed"), running.of("turn")
    assert (warmed["text"], warmed["pieces"], turn["text"]) == ("", 0, "Hello there.")
    assert turn["cached"] > 100


async def test_pipecats_inference_beside_the_conversation_is_of_the_same_service(tmp_path: Path) -> None:
    """If it has a `base_url`; else it goes to OpenAI."""
    async with scripted() as target, client("pipecat_socket", "inference", target, tmp_path) as running:
        await running.end()
    (turn,) = running.of("turn")
    assert turn["text"] == "Hello there."


async def test_after_a_barge_in_pipecats_next_turn_is_answered_at_once(tmp_path: Path) -> None:
    """On the same socket: it waits up to 5 s for the end of what it cancelled."""
    async with scripted() as target:
        assert target.engine is not None
        target.engine.chat = LONG
        async with client("pipecat_socket", "barge_in", target, tmp_path) as running:
            await running.until("closed")
            await until(lambda: target.engine is not None and target.engine.running == 0)
            target.engine.chat = Script(pace=step)
            began = time.monotonic()
            running.go_on()
            turn = await running.until("turn")
            assert time.monotonic() - began < 4
            await running.end()
    assert turn["text"] == "Hello there."


async def test_livekit_leaves_an_interrupted_reply_running_until_its_next_turn(target: Target, tmp_path: Path) -> None:
    """It closes the socket when it opens the next. Over HTTP it ends the reply at once."""
    if target.engine is not None:
        target.engine.chat = LONG
    before = len(target.finished())
    async with client("livekit_socket", "barge_in", target, tmp_path) as running:
        await running.until("closed")
        if target.engine is not None:
            await asyncio.sleep(1)
            assert target.engine.running == 1
            target.engine.chat = Script(pace=step)
        began = time.monotonic()
        running.go_on()
        turn = await running.until("turn")
        took_s = time.monotonic() - began
        await running.end()
        if target.engine is not None:
            assert target.engine.aborted == 1 and took_s < 4
        else:
            await until(lambda: len(target.finished()) >= before + 2)
            left = target.finished()[before]
            assert left["outcome"] in ("disconnected", "finished")
            ran_ms, tokens = left["total_ms"], left["completion_tokens"]
            running.add(f"The reply ran until the next turn, {ran_ms:.0f} ms in all; it made {tokens} tokens.")
    assert turn["text"].strip()


@asynccontextmanager
async def far(target: Target, delay_s: float) -> AsyncIterator[Target]:
    """The same service at the end of a slow line."""
    address = target.http.removeprefix("http://").split(":")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65536):
            loop.call_later(delay_s, writer.write, data)
        loop.call_later(delay_s, writer.close)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*address)
        await asyncio.gather(carry(reader, there_writer), carry(there_reader, writer))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield replace(target, http=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


async def test_a_barge_in_before_the_reply_has_begun_ends_it(tmp_path: Path) -> None:
    """Pipecat does not know the reply's id yet, and cancels the one before."""
    async with scripted() as near, far(near, 0.05) as target:
        assert target.engine is not None
        async with client("pipecat_socket", "barge_in_early", target, tmp_path) as running:
            await running.until("idle")
            target.engine.chat = LONG
            running.go_on()
            await until(lambda: target.engine is not None and target.engine.running == 1)
            running.go_on()
            await running.until("closed")
            await until(lambda: target.engine is not None and target.engine.running == 0)
            assert target.engine.aborted == 1
            target.engine.chat = Script(pace=step)
            began = time.monotonic()
            running.go_on()
            turn = await running.until("turn")
            assert time.monotonic() - began < 4
            await running.end()
    assert turn["text"] == "Hello there."
