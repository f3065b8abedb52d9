"""The death of an engine, seen by everyone who talks; on scripted engines. `test_real.py` kills real ones."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from conftest import Frame, service
from fakes import Gate, Script, ScriptedEngine
from structlog.testing import capture_logs
from websockets import ConnectionClosed

from yaptext.engine.base import Engines
from yaptext.server import lifecycle, pulse, watch


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


@pytest.mark.parametrize("watchdog", [False, True])
async def test_a_hung_engine_is_told_by_every_route(monkeypatch: pytest.MonkeyPatch, watchdog: bool) -> None:
    """Nothing is raised by it. With a watchdog or without: the health checks, /status, the gauge and systemd's status
    name it after seconds, and say when it is back. The other engine goes on being heard."""
    monkeypatch.setattr(pulse, "SILENT_S", 0.2)
    monkeypatch.setattr(pulse, "LOOK_S", 0.05)
    if not watchdog:
        monkeypatch.setattr(watch, "PROBE_EVERY_S", 0.05)
    statuses: list[str] = []
    monkeypatch.setattr(lifecycle, "notify", lambda *told: statuses.extend(s for s in told if s[:6] == "STATUS"))
    chat, tool, gate = ScriptedEngine(model="big"), ScriptedEngine(model="small"), Gate()
    settings = {"WATCHDOG_USEC": 100_000} if watchdog else {}
    with capture_logs() as lines:
        async with service(Engines(chat=chat, tool=tool), **settings) as running:
            async with httpx.AsyncClient(base_url=running.http, headers={"X-API-Key": "yap_token"}) as client:

                async def ready(code: int) -> None:
                    async with asyncio.timeout(60):
                        while (await client.get("/readyz")).status_code != code:  # noqa: ASYNC110
                            await asyncio.sleep(0.02)

                async def told() -> tuple[Any, Any, list[str]]:
                    status = (await client.get("/status")).json()
                    metrics = (await client.get("/metrics")).text.splitlines()
                    gauges = [line for line in metrics if line.startswith("yaptext_engine_silent{")]
                    return status["status"], status["healthy"], gauges

                gauges = ['yaptext_engine_silent{engine="chat"} 0.0', 'yaptext_engine_silent{engine="tool"} 0.0']
                await ready(200)
                assert await told() == ("running", True, gauges)
                tool.chat = Script(pace=gate)
                await ready(503)
                for path in ("/readyz", "/healthz"):
                    answer = await client.get(path)
                    assert answer.status_code == 503 and answer.json()["status"] == "engine_silent"
                    assert answer.json()["reason"].startswith("The tool engine has not answered since ")
                assert await told() == ("engine_silent", False, [gauges[0], gauges[1].replace("0.0", "1.0")])
                assert statuses[-1].startswith("STATUS=Serving on ") and "The tool engine has not" in statuses[-1]
                asked = len(chat.requests)
                async with asyncio.timeout(60):
                    while len(chat.requests) < asked + 2:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                tool.chat = Script()
                gate.step()
                await ready(200)
                assert (await client.get("/healthz")).status_code == 200
                assert await told() == ("running", True, gauges)
                assert statuses[-1] == f"STATUS=Serving on 127.0.0.1:{running.server.bound_port}."
    found = [line for line in lines if line["event"] in ("engine.silent", "engine.answers")]
    assert [(line["event"], line["engine"], line["model"]) for line in found[:2]] == [
        ("engine.silent", "tool", "small"),
        ("engine.answers", "tool", "small"),
    ]


async def test_an_engine_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns fail, the service is not ready and says why, and serves when the engine is back. The process lives, and the
    supervisor's watchdog is fed. Only the log has the address of the model server."""
    monkeypatch.setattr(watch, "PROBE_EVERY_S", 0.05)
    fed: list[str] = []
    monkeypatch.setattr(watch, "notify", lambda *told: fed.extend(told))
    engine, why = ScriptedEngine(model="big"), "http://10.0.0.5:8000 refuses connections."
    with capture_logs() as lines:
        async with service(Engines(chat=engine, tool=engine)) as running, running.connect() as socket:
            async with httpx.AsyncClient(base_url=running.http, headers={"X-API-Key": "yap_token"}) as client:

                async def turn() -> Frame:
                    await socket.send(json.dumps({"type": "start", "session_id": "s", "user_utterance": "hi"}))
                    while (frame := json.loads(await socket.recv()))["type"] not in ("done", "error"):
                        pass
                    return frame

                assert (await turn())["type"] == "done"
                engine.away = why
                assert (await turn())["error_code"] == "engine_failed"
                reason = "The chat+tool engine is away: The model server does not answer."
                answer = await client.get("/readyz")
                assert (answer.status_code, answer.json()["reason"]) == (503, reason)
                assert (await client.get("/healthz")).status_code == 200
                status = (await client.get("/status")).json()
                assert (status["status"], status["healthy"], status["silence"]) == ("engine_silent", False, reason)
                fed.clear()
                async with asyncio.timeout(60):
                    while len(fed) < 2:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                assert set(fed) == {"WATCHDOG=1"}
                engine.away = ""
                assert (await client.get("/readyz")).status_code == 200
                assert (await turn())["type"] == "done"
        assert running.server.exit_status == 0
    found = [line for line in lines if line["event"] in ("engine.away", "engine.back", "probe.failed")]
    assert [(line["event"], line.get("error")) for line in found] == [("engine.away", why), ("engine.back", None)]
