"""The death of an engine, seen by everyone who talks; on scripted engines. `test_real.py` kills real ones."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from conftest import Frame, service
from fakes import Gate, Script, ScriptedEngine
from websockets import ConnectionClosed

from yaptext.engine.base import Engines


@pytest.mark.parametrize("dying", ["chat", "tool"])
async def test_when_one_engine_dies_every_turn_hears_it_and_the_process_ends(dying: str) -> None:
    """Turns on the engine that lives get `engine_failed`, too, in the place of their `done`; a socket without a turn is
    told when to come back; the engines are not waited for."""
    engines = {"chat": ScriptedEngine(), "tool": ScriptedEngine()}
    async with service(Engines(**engines)) as running, running.connect() as talking, running.connect() as quiet:
        engines["chat"].chat = Script(["a", "b"], pace=Gate())
        await talking.send(json.dumps({"type": "start", "session_id": "s", "user_utterance": "hi"}))
        while json.loads(await talking.recv())["type"] != "toolcall":
            pass
        begun = time.monotonic()
        engines[dying].dead = True
        heard: list[list[Frame]] = []
        for socket in (talking, quiet):
            heard.append([])
            with pytest.raises(ConnectionClosed):
                while True:
                    heard[-1].append(json.loads(await asyncio.wait_for(socket.recv(), 60)))
            assert socket.close_code == 1012
        await asyncio.wait_for(running.server.lifecycle.exit_requested.wait(), 60)
        assert time.monotonic() - begun < 2
        codes = [[(frame["error_code"], frame.get("turn")) for frame in frames] for frames in heard]
        assert codes == [[("engine_failed", 1), ("going_away", None)], [("going_away", None)]]
        assert running.server.exit_status == 1
    assert all(engine.closed and engine.hurried for engine in engines.values())
