"""server/playground/prompt.py: what a person reads is what the models get."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import Running, service, until
from fakes import ScriptedEngine
from structlog.testing import capture_logs

from yaptext.client import Yap, connect
from yaptext.dialogue.runtime import Runtime
from yaptext.engine.base import WARM, Engines

ROUTE = "/playground/prompt"
LAMP = {"name": "lamp", "description": "Switches a lamp."}


@pytest.fixture(autouse=True)
def _one_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "now", staticmethod(lambda: "Sunday, 21:46"))


@asynccontextmanager
async def door(
    chat: ScriptedEngine | None = None, **variables: Any
) -> AsyncIterator[tuple[httpx2.AsyncClient, ScriptedEngine, Running]]:
    engine = chat or ScriptedEngine()
    async with service(Engines(engine, engine), **variables) as running:
        headers = {"X-API-Key": "yap_token"}
        async with httpx2.AsyncClient(base_url=running.http, headers=headers, timeout=60) as client:
            yield client, engine, running


async def shown(client: httpx2.AsyncClient, utterance: str | None = "hi", **fields: Any) -> dict[str, Any]:
    frame = {"type": "start", "session_id": "s", "user_utterance": utterance, **fields}
    answer = await client.post(ROUTE, json=frame)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def sent(yap: Yap, engine: ScriptedEngine, utterance: str | None = "hi", **fields: Any) -> dict[str, Any]:
    """The ids of the prompts that a turn leads to, by role."""
    engine.requests.clear()
    async with yap.turn(utterance, **fields) as turn:
        await turn.result()
    found: dict[str, Any] = {"chat": None, "tool": None}
    for ids, sampling, priority in engine.requests:
        if priority != WARM:  # those follow a turn, or come of the one before
            found["chat" if sampling.json_schema is None else "tool"] = list(ids)
    return found


def ids(found: dict[str, Any]) -> dict[str, Any]:
    return {role: prompt and prompt["ids"] for role, prompt in found.items()}


@pytest.mark.parametrize("format", ["segments", "turns"])
async def test_it_is_exactly_what_the_turn_sends(format: str) -> None:
    """Token for token, whatever the turn is made of: persona, history in both forms, tools, a note, what was heard,
    what the session has from before, an utterance that is cut, none at all."""
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    steps: list[tuple[str | None, dict[str, Any]]] = [
        ("hi", {}),
        ("and <|im_end|> now?", {"heard_text": "Hello"}),
        ("again", {"persona_text": "You are a lighthouse.", "note": "It is dark."}),
        ("still a lighthouse?", {"heard_chars": 0}),
        ("list", {"history": history, "heard_chars": 3}),
        ("tools", {"tools": [LAMP], "persona_text": None, "persona_style": "savage"}),
        ("the same tools", {}),
        ("no tools", {"tools": []}),
        ("own tools", {"tools": None}),
        ("none", {"history": None}),
        ("long " * 2000, {"history": [{"role": "user", "content": f"message {n} " * 5} for n in range(420)]}),
        (None, {}),
    ]
    async with door(CHAT_PROMPT_FORMAT=format) as (client, engine, running):
        async with connect(running.ws, "yap_token", session_id="s") as yap:
            for utterance, fields in steps:
                there = await shown(client, utterance, **fields)
                assert ids(there) == await sent(yap, engine, utterance, **fields), utterance
                for prompt in filter(None, there.values()):
                    assert prompt["exact"] and engine.decode(prompt["ids"]) == prompt["text"]
            assert (await shown(client, None))["tool"] is None


async def test_nothing_of_the_session_changes() -> None:
    """Neither an existing one, nor is one made."""
    async with door() as (client, engine, running):
        await shown(client, "hi", persona_style="savage", history_text="User: a\nAssistant: b")
        async with connect(running.ws, "yap_token", session_id="s") as yap:
            assert not (await yap.get_session()).known
            await sent(yap, engine, "first", tools=[LAMP])
            before = await yap.get_session()
            await shown(client, "x", persona_style="savage", tools=[], history=[], heard_chars=1)
            assert await yap.get_session() == before
        assert engine.requests and running.active == 0


async def test_a_model_that_is_not_deployed_has_none() -> None:
    engine = ScriptedEngine()
    for chat, tool, deployed in ((engine, None, "chat"), (None, engine, "tool")):
        async with service(Engines(chat, tool), DEPLOY_MODELS=deployed) as running:
            async with httpx2.AsyncClient(base_url=running.http, headers={"X-API-Key": "yap_token"}) as client:
                found = await shown(client)
                assert [role for role, prompt in found.items() if prompt is not None] == [deployed]


async def test_it_is_refused_as_the_start_would_be() -> None:
    """With the field that is wrong. What is no start has no prompt."""
    async with door() as (client, _, _):
        for frame, code, part in (
            (b"{", "bad_message", "Input data was truncated"),
            (b"\xff", "bad_message", ""),
            (b'{"type":"ping"}', "bad_message", "$.type"),
            (b'{"type":"start","session_id":"s"}', "bad_message", "user_utterance"),
            (b'{"type":"start","session_id":"s","user_utterance":" "}', "bad_message", "blank"),
            (
                b'{"type":"start","session_id":"s","user_utterance":"a","persona_style":"nope"}',
                "unknown_persona",
                "known",
            ),
            (
                json.dumps({"type": "start", "session_id": "s", "user_utterance": "a", "persona_text": "a b " * 9000}),
                "text_too_long",
                "limit is 2500",
            ),
        ):
            answer = await client.post(ROUTE, content=frame)
            assert (answer.status_code, answer.json()["error_code"]) == (400, code), frame
            assert part in answer.json()["message"]
        assert (await client.post(ROUTE, content=b"x" * 70_000)).status_code == 400
        assert (await client.get(ROUTE)).status_code == 405


async def test_it_costs_a_message_and_shows_each_key_its_own_session(tmp_path: Path) -> None:
    """Without a key, or with it in the address, there is nothing."""
    keys = tmp_path / "keys"
    lines = (f"{name} sha256:{hashlib.sha256(name.encode()).hexdigest()} messages_per_minute=9\n" for name in "ab")
    await asyncio.to_thread(keys.write_text, "".join(lines))
    async with door(YAP_TEXT_KEY_FILE=keys) as (client, _, running):
        frame = {"type": "start", "session_id": "s", "user_utterance": "hi"}
        assert (await client.post(ROUTE, json=frame)).status_code == 401
        client.headers["X-API-Key"] = ""
        assert (await client.post(f"{ROUTE}?api_key=a", json=frame)).status_code == 401
        async with connect(running.ws, "a", session_id="s") as yap:
            async with yap.turn("my secret is blue") as turn:
                await turn.result()
        client.headers["X-API-Key"] = "a"
        assert "blue" in (await shown(client))["chat"]["text"]
        client.headers["X-API-Key"] = "b"
        for _ in range(9):
            assert "blue" not in (await shown(client))["chat"]["text"]
        answer = await client.post(ROUTE, json=frame)
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0


async def test_nothing_of_it_is_logged_or_kept_by_a_browser() -> None:
    """LOG_TEXT is about turns, and none ran."""
    with capture_logs() as lines:
        async with door(LOG_TEXT=1) as (client, _, _):
            for utterance in ("violet", "violet " * 3000):
                await shown(client, utterance, history_text="User: indigo\nAssistant: lilac", note="mauve")
            frame = {"type": "start", "session_id": "s", "user_utterance": "violet", "persona_style": "indigo"}
            answer = await client.post(ROUTE, json=frame)
            assert answer.status_code == 400 and answer.headers["Cache-Control"] == "no-store"
    assert not any(word in str(lines) for word in ("violet", "indigo", "lilac", "mauve"))


async def test_a_client_that_leaves_in_its_body_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Of the service, whose log stays quiet."""
    async with door() as (client, _, running):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.server.bound_port)
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: yap_token\r\nContent-Length: 100\r\n\r\n{{"
        writer.write(head.encode())
        await writer.drain()
        await until(lambda: bool(running.server.server_state.tasks))
        writer.close()
        await writer.wait_closed()
        await until(lambda: not running.server.server_state.tasks)
        await shown(client)
    assert reader.at_eof() and not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_without_the_page_there_is_none() -> None:
    async with door(PLAYGROUND=0) as (client, _, _):
        assert (await client.post(ROUTE, json={})).status_code == 404
