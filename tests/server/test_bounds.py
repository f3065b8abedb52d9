"""What a client with a key may cost others: texts, tools and sessions are bounded before anything of them is kept."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from conftest import talking
from fakes import Gate, Script, ScriptedEngine

from yaptext.server.access.keyfile import Limits

LONG = "word " * 180_000


async def test_a_turn_that_never_ran_leaves_no_long_text() -> None:
    """Its utterance of 900 KB stayed in the transcript, and the next turn encoded all of it."""
    async with talking(ScriptedEngine(Script(["a"], pace=Gate())), DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        for _ in range(30):
            socket.start(LONG)
        await socket.until("done", 29)
        limit = talk.runtime.history_bytes
        messages = talk.runtime.sessions.recent(60)[0].transcript.messages
        assert sum(len(message.text) for message in messages) <= limit
        assert max(len(message.text) for message in messages) <= talk.runtime.utterance_chars


async def test_turns_that_are_cut_before_their_prompt_do_not_lengthen_the_transcript_for_ever() -> None:
    """Only a prompt trims it to its tokens."""
    async with talking(
        ScriptedEngine(Script(["a"], pace=Gate())), DEPLOY_MODELS="chat", HISTORY_MAX_TOKENS=100
    ) as talk:
        socket = talk.socket()
        for number in range(200):
            socket.start(f"{number} " + "x" * 1000)
        await socket.until("done", 199)
        messages = talk.runtime.sessions.recent(60)[0].transcript.messages
        assert sum(len(message.text) for message in messages) <= talk.runtime.history_bytes
        assert messages[-1].text.startswith("198 ")


@pytest.mark.parametrize("kind", ["history_text", "history"])
async def test_what_waits_is_kept_as_far_as_it_is_looked_at(kind: str) -> None:
    """Frames of a megabyte wait for the turn before them: of each, no more than a prompt may hold."""
    told: Any = f"User: {LONG}" if kind == "history_text" else [{"role": "user", "content": "a b c"}] * 60_000
    async with talking(ScriptedEngine(Script(["a"], pace=Gate())), DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.start("first")
        await socket.until("ack")
        gc.collect()
        for _ in range(20):
            socket.start("next", **{kind: told})
        await socket.until("ack", 20)
        (session,) = talk.runtime.sessions.recent(60)
        sizes = [len(message.text) for message in session.transcript.messages]
        assert sum(sizes) <= talk.runtime.history_bytes and session.weigh() < 3_000_000


async def test_a_persona_or_note_that_is_too_long_is_refused_where_it_arrives() -> None:
    """Before it waits for anything."""
    async with talking(DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        for kind, fields in (
            ("start", {"persona_text": LONG}),
            ("start", {"note": LONG}),
            ("warm_persona", {"persona_text": LONG}),
            ("warm_history", {"persona_text": LONG, "history_text": "User: hi"}),
        ):
            socket.say(kind, **({"session_id": "s", "user_utterance": "x"} if kind == "start" else {}), **fields)
        socket.say("ping")
        await socket.until("pong")
        assert [error["error_code"] for error in socket.of("error")] == ["text_too_long"] * 4


async def test_a_session_of_a_frame_costs_the_key_a_turn() -> None:
    """`set_persona` opened as many as there are ids."""
    async with talking(DEPLOY_MODELS="chat") as talk:
        socket = talk.socket(limits=Limits(turns_per_minute=3))
        for number in range(5):
            socket.say("set_persona", session_id=f"s{number}", persona_style="savage")
        socket.say("set_persona", session_id="s0", persona_style="wholesome")
        socket.say("ping")
        await socket.until("pong")
        assert [error["error_code"] for error in socket.of("error")] == ["rate_limited"] * 2
        assert len(talk.runtime.sessions) == 3 and len(socket.of("ack")) == 4


async def test_equal_lists_of_tools_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sessions bring them: checked once, shared by all."""
    tools = [{"name": f"tool_{number}", "parameters": {"type": "object"}} for number in range(20)]
    checked: list[str] = []

    class Checking(ScriptedEngine):
        async def check_schema(self, schema: str) -> None:
            checked.append(schema)

    engine = Checking()
    async with talking(engine, engine) as talk:
        for number in range(5):
            socket = talk.socket()
            socket.start("Hi", session_id=f"s{number}", tools=tools)
            await socket.until("done")
        sessions = talk.runtime.sessions.recent(60)
        assert len({id(session.tools) for session in sessions}) == 1 and len(checked) == 1


async def test_new_lists_of_tools_are_charged() -> None:
    """Each costs everybody's time: a key may bring 60 a minute."""
    async with talking() as talk:
        socket = talk.socket()
        for number in range(70):
            socket.start("Hi", tools=[{"name": f"tool_{number}"}])
        socket.say("ping")
        await socket.until("pong")
        assert [error["error_code"] for error in socket.of("error")] == ["rate_limited"] * 10


async def test_a_long_list_of_tools_lets_others_have_their_turn() -> None:
    """It is looked at in steps: 64 tools with 12 references each held the loop for 8.6 ms, and as much again."""
    properties = {f"p{number}": {"$ref": "#/$defs/a"} for number in range(12)}
    parameters = {"type": "object", "properties": properties, "$defs": {"a": {"type": "string"}}}
    tools = [{"name": f"t{number}", "parameters": parameters} for number in range(64)]
    async with talking() as talk:
        socket = talk.socket()
        turns = 0
        socket.start("Hi", tools=tools)
        while not socket.of("ack"):
            await asyncio.sleep(0)
            turns += 1
        assert turns > 64
        await socket.until("done")
