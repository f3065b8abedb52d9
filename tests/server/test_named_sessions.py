"""server/openai/asked.py: a session that requests of OpenAI's clients name, while others use it, too."""

from __future__ import annotations

import asyncio
import json

import pytest
from conftest import until
from fakes import Gate, Script
from server.test_chat_completions import door, prompts
from server.test_responses import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")


def told(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]


async def test_a_session_has_its_transcript_while_a_request_runs_in_its_name() -> None:
    """A turn of `/ws` goes by it, and `get_session` shows it."""
    gate = Gate()
    async with door(Script(["a"] * 50, pace=gate)) as (client, engine, running), running.connect() as ws:
        gate.step(50)
        wanted = {"model": "chat", "messages": told("first"), "user": "s"}
        assert (await client.post("/v1/chat/completions", json=wanted)).status_code == 200
        request = asyncio.create_task(client.post("/v1/chat/completions", json=wanted))
        await until(lambda: engine.running == 1)
        await ws.send(json.dumps({"type": "get_session", "session_id": "s"}))
        assert [each["content"] for each in json.loads(await ws.recv())["history"]] == ["first", "a" * 50]
        await ws.send(json.dumps({"type": "start", "session_id": "s", "user_utterance": "second"}))
        await until(lambda: engine.running >= 2)
        assert "first" in prompts(engine)[-1]
        gate.step(200)
        await request


async def test_of_requests_that_run_beside_each_other_the_last_one_leaves_the_transcript() -> None:
    """A request that is given up ends after the one that came in its place."""
    gate = Gate()
    async with door(Script(["a", "b"], pace=gate), None) as (client, engine, running), running.connect() as ws:
        first = asyncio.create_task(
            client.post("/v1/chat/completions", json={"model": "chat", "messages": told("early"), "user": "s"})
        )
        await until(lambda: engine.running == 1)
        engine.chat = Script(["late"])
        late = {"model": "chat", "messages": told("one", "two", "three"), "user": "s"}
        assert (await client.post("/v1/chat/completions", json=late)).status_code == 200
        gate.step(10)
        assert (await first).status_code == 200
        await ws.send(json.dumps({"type": "get_session", "session_id": "s"}))
        assert [each["content"] for each in json.loads(await ws.recv())["history"]] == ["one", "two", "three", "late"]


async def test_a_warm_up_leaves_the_session_to_the_turn_beside_it() -> None:
    gate = Gate()
    async with door(Script(["a"], pace=gate)) as (client, engine, running), running.connect() as ws:
        async with connected(running) as socket:
            first = asyncio.create_task(
                client.post("/v1/responses", json={"model": "chat", "input": "one", "user": "s"})
            )
            await until(lambda: engine.running == 1)
            engine.chat = Script(["b"])
            await socket.create("two", user="s", generate=False)
            await socket.until("response.completed")
            gate.step(1)
            assert (await first).status_code == 200
        await ws.send(json.dumps({"type": "get_session", "session_id": "s"}))
        state = json.loads(await ws.recv())
        assert ([each["content"] for each in state["history"]], state["turns"]) == (["one", "a"], 1)


async def test_what_is_forgotten_while_it_is_continued_is_not_kept() -> None:
    """The request that goes on does not name the session: its conversation comes from it all the same."""
    gate = Gate()
    async with door(Script(["a"], pace=gate)) as (client, engine, running):
        gate.step(1)
        first = (await client.post("/v1/responses", json={"model": "chat", "input": "one", "user": "s"})).json()
        async with running.connect() as ws, connected(running) as socket:
            await socket.create("two", previous_response_id=first["id"])
            await until(lambda: engine.running == 1)
            await ws.send(json.dumps({"type": "forget", "session_id": "s"}))
            assert json.loads(await ws.recv())["type"] == "forgotten"
            gate.step(10)
            last = (await socket.until("response.completed"))[-1]["response"]
            assert (await socket.ask(previous_response_id=last["id"]))[-1]["type"] == "error"


async def test_long_names_that_begin_alike_are_of_two_sessions() -> None:
    """Of a name 128 characters counted: one user's request continued the conversation of the other."""
    async with door() as (client, _, running), connected(running) as socket:
        name = "x" * 128
        await client.post("/v1/responses", json={"model": "chat", "input": "one", "user": f"{name}a"})
        assert (await socket.ask(previous_response_id="resp_1", user=f"{name}b"))[-1]["type"] == "error"
        assert (await socket.ask(previous_response_id="resp_1", user=f"{name}a"))[-1]["type"] == "response.completed"
