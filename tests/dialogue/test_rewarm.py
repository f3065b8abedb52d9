"""dialogue/warming.py: what is computed again after a restart, in which order, and when not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import talking
from fakes import Gate, Script, ScriptedEngine

from yaptext.dialogue import warming
from yaptext.dialogue.runtime import Runtime
from yaptext.errors import EngineFailed
from yaptext.server.lifecycle import Lifecycle


def remember(runtime: Runtime, *names: str) -> None:
    """As the file does at a start."""
    for name in names:
        runtime.sessions.open(("k", name)).transcript.add_turn(f"I am {name}. " + "word " * 40, "Hello.")


def warmed(engine: ScriptedEngine) -> list[str]:
    """Whose prefixes were computed at the lowest priority, in order."""
    texts = [engine.decode(prompt) for prompt, _, priority in engine.requests if priority == 2]
    return [text.partition("I am ")[2].partition(".")[0] for text in texts]


async def all_of(steps: Any) -> None:
    async for _ in steps:
        pass


async def test_the_last_ones_come_first_and_no_more_than_have_a_place() -> None:
    """One by one, as many as could come back at once."""
    engine = ScriptedEngine()
    async with talking(engine) as talk:
        remember(talk.runtime, "a", "b", "c", "d")
        await all_of(warming.rewarm(talk.runtime, 3))
        assert warmed(engine) == ["d", "c", "b"]


async def test_each_is_computed_where_its_key_will_look() -> None:
    """CACHE_PER_KEY: other keys do not find it."""
    engine = ScriptedEngine()
    async with talking(engine, CACHE_PER_KEY=1) as talk:
        remember(talk.runtime, "a")
        await all_of(warming.rewarm(talk.runtime, 1))
        socket = talk.socket("k")
        socket.start("and on", "a")
        assert (await socket.until("done"))["usage"]["cached_tokens"] > 16


async def test_half_of_the_cache_is_left_to_others() -> None:
    """Over that, the first ones would be overwritten again."""
    engine = ScriptedEngine(cache_tokens=500)
    async with talking(engine) as talk:
        remember(talk.runtime, *"abcdefgh")
        await all_of(warming.rewarm(talk.runtime, 8))
        sizes = [len(prompt) for prompt, _, priority in engine.requests if priority == 2]
        assert 0 < sum(sizes) <= 250 < sum(sizes) + min(sizes)


async def test_who_was_away_for_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who spoke shortly before."""
    engine = ScriptedEngine()
    async with talking(engine) as talk:
        remember(talk.runtime, "a", "b")
        session = talk.runtime.sessions.find(("k", "a"))
        assert session is not None
        session.used_at -= 601
        await all_of(warming.rewarm(talk.runtime, 8))
        assert warmed(engine) == ["b"]


async def test_it_waits_while_anybody_is_served() -> None:
    """And leaves out who has come back meanwhile."""
    gate, engine = Gate(), ScriptedEngine()
    async with talking(engine) as talk:
        remember(talk.runtime, "a", "b")
        engine.chat = Script(["x"], pace=gate)
        socket = talk.socket("k")
        socket.start("hi", "b", tools=[])
        await socket.until("toolcall")
        steps = warming.rewarm(talk.runtime, 8)
        for _ in range(5):
            await anext(steps)
        assert warmed(engine) == []
        gate.step()
        await socket.until("done")
        engine.chat = Script()
        remember(talk.runtime, "b")
        await all_of(steps)
        assert warmed(engine) == ["a"]


async def test_a_session_that_cannot_be_computed_keeps_no_other_from_it() -> None:
    """A persona over a limit that was lowered, a failing engine: its next turn tells its user."""
    engine = ScriptedEngine()
    async with talking(engine, PERSONA_MAX_TOKENS=200) as talk:
        remember(talk.runtime, "a", "b", "c")
        session = talk.runtime.sessions.find(("k", "b"))
        assert session is not None
        session.persona = type(session.persona)(text="long " * 300)
        await all_of(warming.rewarm(talk.runtime, 8))
        assert warmed(engine) == ["c", "a"]
        engine.chat = Script(error=EngineFailed("no"))
        await all_of(warming.rewarm(talk.runtime, 8))


async def test_it_begins_at_ready_and_ends_with_a_drain() -> None:
    """A start is not longer for it, and a stop neither."""
    taken = 0

    async def steps() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield
            await asyncio.sleep(0)

    lifecycle = Lifecycle()
    running = asyncio.create_task(lifecycle.while_ready(steps()))
    await asyncio.sleep(0.05)
    assert taken == 0
    lifecycle.phase = "ready"
    async with asyncio.timeout(60):
        while taken < 3:  # noqa: ASYNC110  # a counter has no event
            await asyncio.sleep(0)
        lifecycle.phase = "draining"
        await running
