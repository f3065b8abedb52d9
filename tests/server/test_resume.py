"""What a session is when its client comes back: after a cut, and after a restart."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Running, service
from fakes import Gate, Script, ScriptedEngine

from yaptext.engine.base import CHAT, Engines
from yaptext.store import sqlite

PERSONA = {"persona_text": "You are Ada, who counts."}


async def turn(running: Running, utterance: str, session_id: str = "s", **fields: Any) -> int:
    """Says something over a socket of its own; returns the turn's number."""
    async with running.connect() as socket:
        start = {"type": "start", "session_id": session_id, "user_utterance": utterance, **fields}
        await socket.send(json.dumps(start))
        async with asyncio.timeout(60):
            while (frame := json.loads(await socket.recv()))["type"] != "done":
                assert frame["type"] != "error", frame
        return int(frame["turn"])


def prompt(engine: ScriptedEngine) -> str:
    """What the engine was asked last by a turn."""
    return engine.decode([ids for ids, _, priority in engine.requests if priority == CHAT][-1])


def chat_only(**script: Any) -> tuple[ScriptedEngine, Engines]:
    engine = ScriptedEngine(**script)
    return engine, Engines(engine, None)


async def test_a_cut_socket_loses_nothing_that_was_heard() -> None:
    """The network goes in the middle of a reply: the conversation goes on with what was sent of it."""
    engine, engines = chat_only()
    async with service(engines, DEPLOY_MODELS="chat") as running:
        gate = Gate()
        await turn(running, "remember four", **PERSONA)
        engine.chat = Script(["Four", " it", " is"], pace=gate)
        socket = await running.connect()
        await socket.send(json.dumps({"type": "start", "session_id": "s", "user_utterance": "and five"}))
        gate.step()
        while json.loads(await socket.recv())["type"] != "token":
            pass
        socket.transport.abort()
        async with asyncio.timeout(60):
            while running.active:  # noqa: ASYNC110  # a slot has no event
                await asyncio.sleep(0.01)
        engine.chat = Script(["Nine."])
        assert await turn(running, "the sum?") == 3
        for text in ("You are Ada", "remember four", "Hello there.", "and five", "Assistant: Four\n", "the sum?"):
            assert text in prompt(engine), text


async def test_a_restart_keeps_conversations(tmp_path: Path) -> None:
    """SESSION_STORE=sqlite: the next process's prompt has persona and transcript, also of a turn that the drain cut and
    of what was set without a turn."""
    stored = {"DEPLOY_MODELS": "chat", "YAP_TEXT_STATE_DIR": tmp_path, "SESSION_STORE": "sqlite:sessions.db"}
    engine, engines = chat_only()
    async with service(engines, **stored, DRAIN_TIMEOUT_S=0) as running:
        await turn(running, "remember four", **PERSONA)
        async with running.connect() as socket:
            await socket.send(json.dumps({"type": "set_persona", "session_id": "set", **PERSONA}))
            gate = Gate()
            engine.chat = Script(["Five", " it", " is"], pace=gate)
            await socket.send(json.dumps({"type": "start", "session_id": "s", "user_utterance": "and five"}))
            gate.step()
            while json.loads(await socket.recv())["type"] != "token":
                pass
            running.server.begin_drain()
            while json.loads(await socket.recv())["type"] != "error":
                pass
        assert running.server.drained is not None
        await running.server.drained
    engine, engines = chat_only()
    async with service(engines, **stored) as running:
        assert await turn(running, "the sum?") == 3
        for text in ("You are Ada", "remember four", "Hello there.", "and five", "Assistant: Five\n", "the sum?"):
            assert text in prompt(engine), text
        assert await turn(running, "hi", "set") == 1
        assert "You are Ada" in prompt(engine)
        await turn(running, "hi", "another")
        assert "You are Ada" not in prompt(engine)


async def test_a_file_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In /status and /metrics, from the start on until it can be again; turns go on."""
    monkeypatch.setattr(sqlite, "RETRY_S", 0.05)
    blocked = tmp_path / "blocked"
    blocked.touch()
    _, engines = chat_only()
    stored = {"YAP_TEXT_STATE_DIR": tmp_path, "SESSION_STORE": "sqlite:blocked/sessions.db"}
    async with service(engines, DEPLOY_MODELS="chat", **stored) as running:
        async with httpx.AsyncClient(base_url=running.http, trust_env=False) as client:

            async def told() -> tuple[bool, bool]:
                status = (await client.get("/status", headers={"X-API-Key": "yap_token"})).json()
                metrics = (await client.get("/metrics")).text
                return status["session_file_failing"], "yaptext_session_file_failing 1.0" in metrics

            assert await told() == (True, True)
            assert await turn(running, "hi") == 1
            assert await told() == (True, True)
            blocked.unlink()
            async with asyncio.timeout(10):
                while await told() != (False, False):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        assert (blocked / "sessions.db").exists()


async def test_by_default_a_restart_forgets(tmp_path: Path) -> None:
    """SESSION_STORE=memory: nothing that was said touches the disk, only how long the start took."""
    for _ in range(2):
        engine, engines = chat_only()
        async with service(engines, DEPLOY_MODELS="chat", YAP_TEXT_STATE_DIR=tmp_path) as running:
            assert await turn(running, "remember four") == 1
    assert "four" not in prompt(engine).replace("remember four", "", 1)
    assert os.listdir(tmp_path) == ["start.json"]


async def test_a_restart_computes_again_what_its_users_will_need(tmp_path: Path) -> None:
    """After READY, below everybody else's priority: who comes back finds his prefix, as before the restart."""
    stored = {"DEPLOY_MODELS": "chat", "YAP_TEXT_STATE_DIR": tmp_path, "SESSION_STORE": "sqlite:sessions.db"}
    engine, engines = chat_only()
    async with service(engines, **stored) as running:
        await turn(running, "remember four " * 20, **PERSONA)
    engine, engines = chat_only()
    async with service(engines, **stored) as running:
        async with asyncio.timeout(60):
            while not (warmed := [ids for ids, _, priority in engine.requests if priority == 2]):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert len(warmed) == 1 and "remember four" in engine.decode(warmed[0])
        assert running.server.lifecycle.phase == "ready"
        await turn(running, "the sum?")
        assert engine.requests[-1][0][: len(warmed[0])] == warmed[0]
