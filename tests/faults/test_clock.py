"""The wall clock jumps: nothing that is measured or kept goes by it."""

from __future__ import annotations

import json
import time

import httpx
import pytest
from conftest import Frame, service
from fakes import Gate, Script, ScriptedEngine

from yaptext.engine.base import Engines

YEAR = 365 * 86_400


@pytest.mark.parametrize("jump", [YEAR, -10 * YEAR])
async def test_a_jump_of_the_clock_in_mid_turn_changes_no_figure(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """The turn ends as it would have, its session is remembered, and the uptime is true."""
    gate, engine = Gate(), ScriptedEngine()
    async with service(Engines(engine, engine), SESSION_TTL_S=60) as running, running.connect() as socket:

        async def until(kind: str) -> Frame:
            while (frame := json.loads(await socket.recv()))["type"] != kind:
                assert frame["type"] != "error", frame
            return dict(frame)

        engine.chat = Script(["a", "b"], pace=gate)
        start = {"type": "start", "session_id": "s", "user_utterance": "hi"}
        await socket.send(json.dumps(start))
        await until("toolcall")
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        gate.step(4)
        done = await until("done")
        assert all(0 <= ms < 10_000 for ms in done["timings"].values())
        await socket.send(json.dumps(start))
        assert (await until("ack"))["turn"] == 2
        await until("done")
        async with httpx.AsyncClient(trust_env=False) as client:
            status = (await client.get(f"{running.http}/status", headers={"X-API-Key": "yap_token"})).json()
        assert 0 <= status["uptime_s"] < 60 and status["sessions"] == 1
