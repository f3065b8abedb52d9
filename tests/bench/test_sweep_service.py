"""bench/sweep_service.py: what the sweep notes of a turn, by the observer that it registers."""

from __future__ import annotations

from typing import Any

from bench.sweep_service import Turns
from conftest import talking
from fakes import Script, ScriptedEngine


async def test_each_turn_that_began_has_one_note() -> None:
    """Its points are in their order; a turn that was cut has those that it reached."""
    notes: list[dict[str, Any]] = []
    async with talking(ScriptedEngine(chat=Script([" word"] * 3))) as talk:
        turns = talk.runtime.observer = Turns(notes)
        socket = talk.socket()
        socket.start()
        await socket.until("done")
        socket.start()
        socket.say("cancel")
        await socket.until("done", 2)
    whole, cut = notes
    assert whole["received"] < whole["decided"] <= whole["passed"]
    assert "passed" not in cut and turns.of_task() is None
