"""server/pulse.py: when an engine is asked, and what is a silence. Time is counted in looks, which are short here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from conftest import until
from fakes import Gate, Script, ScriptedEngine
from structlog.testing import capture_logs

from yaptext.engine.base import Load
from yaptext.errors import EngineFailed
from yaptext.server import pulse
from yaptext.server.pulse import Pulse


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pulse, "LOOK_S", 0.01)
    monkeypatch.setattr(pulse, "SILENT_S", 0.05)
    yield


class Shown(ScriptedEngine):
    """Its load is what a test says, and each time that is asked for is counted."""

    looks = 0
    kv_use = speed = 0.0

    def load(self) -> Load:
        self.looks += 1
        return replace(super().load(), kv_use=self.kv_use, prefill_tokens_per_s=self.speed)


@asynccontextmanager
async def kept(engine: ScriptedEngine, heard: list[str], every_s: float = 0.01) -> AsyncIterator[Pulse]:
    """A pulse that is being kept; `heard` grows with each sign of life."""
    kept = Pulse("chat", engine, lambda: None)
    task = asyncio.create_task(kept.keep(every_s, lambda: heard.append("heard")))
    try:
        yield kept
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_an_idle_engine_is_asked_for_one_token() -> None:
    """At the priority of a decision: it is not to wait behind replies."""
    engine, heard = ScriptedEngine(), list[str]()
    async with kept(engine, heard):
        await until(lambda: len(heard) > 2)
    assert {(sampling.max_tokens, priority) for _, sampling, priority in engine.requests} == {(1, 0)}


async def test_an_engine_that_gave_tokens_is_not_asked() -> None:
    """They say as much as an answer."""
    engine, heard = Shown(), list[str]()

    class Busy(Shown):
        def load(self) -> Load:
            self.speed += 1
            return super().load()

    engine = Busy()
    async with kept(engine, heard):
        await until(lambda: len(heard) > 5)
    assert not engine.requests


async def test_a_hung_engine_falls_silent_and_is_back() -> None:
    """One line each, and one question however long it takes."""
    engine, heard, gate = ScriptedEngine(), list[str](), Gate()
    engine.chat = Script(pace=gate)
    with capture_logs() as lines:
        async with kept(engine, heard) as found:
            await until(lambda: found.silent_since is not None)
            assert not heard
            gate.step(9)
            await until(lambda: found.silent_since is None)
            await until(lambda: bool(heard))
    assert [line["event"] for line in lines] == ["engine.silent", "engine.answers"]
    assert [line["log_level"] for line in lines] == ["error", "info"]
    assert all((line["engine"], line["model"]) == ("chat", "scripted") and line["seconds"] >= 0 for line in lines)


async def test_a_stream_that_makes_progress_is_a_sign_of_life() -> None:
    """All seats of an engine may be taken for longer than an answer may take: its steps show in the KV cache."""

    class Stepping(Shown):
        def load(self) -> Load:
            self.kv_use += 0.001
            return super().load()

    engine, heard = Stepping(), list[str]()
    engine.chat = Script(pace=Gate())
    with capture_logs() as lines:
        async with kept(engine, heard):
            await until(lambda: engine.looks > 50)
    assert len(engine.requests) == 1 and heard and not lines


async def test_prompts_that_wait_give_an_engine_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU one step computes thousands of tokens, and nothing is told meanwhile. It is not endless either."""
    engine, heard = Shown(backlog_ms=600_000), list[str]()
    engine.chat = Script(pace=Gate())
    async with kept(engine, heard) as found:
        await until(lambda: engine.looks > 50)
        assert found.silent_since is None
    engine = Shown(backlog_ms=50)
    engine.chat = Script(pace=Gate())
    async with kept(engine, heard) as found:
        await until(lambda: found.silent_since is not None)
        assert engine.looks > 20, "four times the backlog"
    monkeypatch.setattr(pulse, "MOST_S", 0.1)
    engine = Shown(backlog_ms=600_000)
    engine.chat = Script(pace=Gate())
    async with kept(engine, heard) as found:
        await until(lambda: found.silent_since is not None)
    assert not heard


async def test_an_engine_that_fails_is_not_silent() -> None:
    """It says so, and is not heard: the watchdog goes unfed."""
    engine, heard = ScriptedEngine(), list[str]()
    engine.chat = Script([], error=EngineFailed("The engine failed on this request."))
    with capture_logs() as lines:
        async with kept(engine, heard):
            await until(lambda: len(engine.requests) > 2)
    assert not heard and {line["event"] for line in lines} == {"probe.failed"}


async def test_prompts_whose_users_have_left_count_until_the_next_sign() -> None:
    """The step that computes them goes on."""
    engine, heard = Shown(backlog_ms=600_000), list[str]()
    engine.chat = Script(pace=Gate())
    async with kept(engine, heard) as found:
        await until(lambda: engine.looks > 0)
        engine.backlog_ms = 0
        await until(lambda: engine.looks > 50)
        assert found.silent_since is None and not heard
