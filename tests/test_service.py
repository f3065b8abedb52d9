"""The service from outside: a real uvicorn, a real client, and the embedded model on real vLLM."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from conftest import Frame, check_frames, service
from fakes import Gate, Script, ScriptedEngine

from yaptext.engine.base import Engine, Engines
from yaptext.errors import StartError

pytestmark = pytest.mark.asyncio(loop_scope="session")
PARIS = "What is the capital of France?"
HISTORY = "User: hi there\nAssistant: Hello! How are you?\nUser: I am fine\nAssistant: Great to hear!"


class Borrowed:
    """An engine that outlives the service it is lent to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def aclose(self, *, at_once: bool = False) -> None:
        pass


def scripted(**options: Any) -> Engines:
    engine = ScriptedEngine(**options)
    return Engines(chat=engine, tool=engine)


async def say(socket: Any, type: str, **fields: Any) -> None:
    await socket.send(json.dumps({"type": type, **fields}))


async def until(socket: Any, *types: str) -> list[Frame]:
    """Frames up to and with the first of one of the types."""
    frames: list[Frame] = []
    async with asyncio.timeout(60):
        while not frames or frames[-1]["type"] not in types:
            frames.append(json.loads(await socket.recv()))
    return frames


async def turn(socket: Any, utterance: str, **fields: Any) -> list[Frame]:
    await say(socket, "start", session_id="s", user_utterance=utterance, **fields)
    return await until(socket, "done", "error")


def text_of(frames: list[Frame]) -> str:
    return next(frame["normalized_text"] for frame in frames if frame["type"] == "final")


# --- rule 10: how sockets close


async def closed_with(socket: Any) -> int:
    async with asyncio.timeout(60):
        with pytest.raises(websockets.ConnectionClosed):
            while True:
                await socket.recv()
    return int(socket.close_code)


async def test_rule_10_end_closes_with_1000() -> None:
    """`end` is a normal close."""
    async with service(scripted()) as running, running.connect() as socket:
        await say(socket, "end")
        assert await closed_with(socket) == 1000


@pytest.mark.parametrize("key", ["", "wrong", "yap_toke", "yap_token2", "clé"])
async def test_rule_10_a_wrong_key_is_told_and_closed_with_1008(key: str) -> None:
    """In the guide's own words, whatever the key looks like."""
    async with service(scripted()) as running:
        async with websockets.connect(f"{running.ws}?api_key={key}", proxy=None) as socket:
            (refusal,) = await until(socket, "error")
            assert refusal == {
                "type": "error",
                "error_code": "authentication_failed",
                "message": "Authentication required. Provide valid API key via 'api_key' query parameter or "
                "'X-API-Key' header.",
            }
            assert await closed_with(socket) == 1008


async def test_every_way_to_give_the_key_opens_the_door() -> None:
    """Query, X-API-Key and Bearer, also with a key that is not ASCII."""
    async with service(scripted(), YAP_TEXT_API_KEY="schlüssel") as running:
        ways: list[dict[str, Any]] = [
            {"uri": f"{running.ws}?api_key=schl%C3%BCssel"},
            {"uri": running.ws, "additional_headers": {"X-API-Key": "schlüssel".encode().decode("latin-1")}},
            {
                "uri": running.ws,
                "additional_headers": {"Authorization": "Bearer " + "schlüssel".encode().decode("latin-1")},
            },
        ]
        for way in ways:
            async with websockets.connect(**way, proxy=None) as socket:
                assert (await turn(socket, "hi"))[0]["type"] == "ack"


async def test_rule_10_a_full_house_is_told_and_closed_with_1013() -> None:
    """With its capacity and when to come back; a freed slot is free at once."""
    async with service(scripted(), MAX_CONCURRENT_CONNECTIONS=2) as running:
        async with running.connect() as first, running.connect():
            async with running.connect() as third:
                (refusal,) = await until(third, "error")
                assert refusal["error_code"] == "server_at_capacity" and refusal["retry_after_ms"] > 0
                assert refusal["capacity"] == {"active": 2, "max": 2, "available": 0, "at_capacity": True}
                assert await closed_with(third) == 1013
            await say(first, "end")
            await closed_with(first)
            async with running.connect() as fourth:
                await say(fourth, "ping")
                assert (await until(fourth, "pong", "error"))[-1]["type"] == "pong"


async def test_rule_10_a_frame_over_the_limit_closes_with_1009() -> None:
    """MAX_FRAME_BYTES bounds what one client can make the service hold."""
    async with service(scripted(), MAX_FRAME_BYTES=2048) as running, running.connect() as socket:
        await socket.send("x" * 4096)
        assert await closed_with(socket) == 1009


async def test_rule_10_an_internal_fault_is_told_and_closes_with_1011() -> None:
    """The client learns that it was the service's fault, and nothing of what."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running, running.connect() as socket:
        engine.chat = Script(error=ZeroDivisionError("secret detail"))
        frames = await turn(socket, "hi")
        assert frames[-1]["error_code"] == "internal" and "secret" not in frames[-1]["message"]
        assert await closed_with(socket) == 1011


async def test_rule_10_an_idle_socket_closes_with_4000() -> None:
    """After IDLE_TIMEOUT_S without a frame."""
    async with service(scripted(), IDLE_TIMEOUT_S=0.1) as running, running.connect() as socket:
        assert await closed_with(socket) == 4000


async def test_rule_10_a_client_that_does_not_read_closes_with_4001() -> None:
    """The engine is freed, the slot too; when the client reads again it finds the reason."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        engine.chat = Script(["z" * 100_000] * 200, pace=lambda: asyncio.sleep(0.001))
        async with running.connect(max_queue=1) as socket:
            await say(socket, "start", session_id="s", user_utterance="hi")
            async with asyncio.timeout(60):
                while running.active or not engine.aborted:  # noqa: ASYNC110  # neither has an event
                    await asyncio.sleep(0.01)
            assert await closed_with(socket) == 4001
        assert engine.running == 0


async def test_rule_10_a_drain_finishes_running_turns_then_closes_with_1012() -> None:
    """New sockets are sent away; the running turn gets its done; then everyone hears when to come back."""
    gate, engine = Gate(), ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        engine.chat = Script(["a", "b"], pace=gate)
        async with running.connect() as talking, running.connect() as quiet:
            await say(talking, "start", session_id="s", user_utterance="hi")
            await until(talking, "toolcall")
            running.server.begin_drain()
            await asyncio.sleep(0)
            async with running.connect() as late:
                assert (await until(late, "error"))[-1]["error_code"] == "going_away"
                assert await closed_with(late) == 1012
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"{running.http}/readyz")).status_code == 503
                assert (await client.get(f"{running.http}/healthz")).status_code == 200
            gate.step(5)
            assert (await until(talking, "done"))[-1].get("cancelled") is None
            for socket in (talking, quiet):
                assert (await until(socket, "error"))[-1]["retry_after_ms"] > 0
                assert await closed_with(socket) == 1012


# --- HTTP


async def test_health_needs_no_key_and_status_does() -> None:
    """/healthz, /livez, /readyz are open; /status is not; /metrics is open on loopback."""
    async with service(scripted()) as running, httpx.AsyncClient(base_url=running.http, trust_env=False) as client:
        for path in ("/healthz", "/livez", "/readyz", "/metrics", "/asyncapi.json"):
            assert (await client.get(path)).status_code == 200, path
        for key in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Basic yap_token"}, {"X-API-Key": b"\xff\xfe"}):
            refused = await client.get("/status", headers=key)
            assert refused.status_code == 401 and refused.json()["error_code"] == "authentication_failed"
        by_query = await client.get("/status", params={"api_key": "yap_token"})
        by_header = await client.get("/status", headers={"X-API-Key": "yap_token"})
        assert by_query.status_code == by_header.status_code == 200
        status = by_header.json()
        assert status["connections"] == {"active": 0, "max": 16, "available": 16, "at_capacity": False}
        assert status["engines"]["chat+tool"]["quantization"] == "float" and status["version"]


async def test_what_binds_refuses_new_sockets() -> None:
    """Beyond the usual limit the KV cache at the size of a turn, and at any number a queue of prompts; those that are
    in go on. /status and /metrics tell the figures."""
    engine = ScriptedEngine(cache_tokens=20 * 400)
    variables = {"MAX_CONCURRENT_CONNECTIONS": 100, "MAX_PREFILL_BACKLOG_MS": 500}
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(service(Engines(engine, engine), **variables))
        first = await stack.enter_async_context(running.connect())
        size = running.server.lifespan.state["service"].runtime.metrics
        await turn(first, "hi")
        assert 100 < size.session_tokens < 2000
        admitted = 1
        while True:
            socket = await stack.enter_async_context(running.connect())
            with suppress(websockets.ConnectionClosed):
                await say(socket, "ping")
            frame = json.loads(await socket.recv())
            if frame["type"] != "pong":
                break
            admitted += 1
        fitting = max(16, int(8000 / size.session_tokens))
        assert (frame["error_code"], admitted) == ("server_at_capacity", fitting)
        assert frame["capacity"] == {
            "active": fitting, "max": fitting, "available": 0, "at_capacity": True, "limited_by": "kv_cache"
        }  # fmt: skip
        check_frames(await turn(first, "and on"))
        size.session_tokens, engine.backlog_ms = 10.0, 4000.0
        socket = await stack.enter_async_context(running.connect())
        frame = json.loads(await socket.recv())
        assert frame["capacity"]["limited_by"] == "prefill" and 3000 <= frame["retry_after_ms"] <= 5000
        async with httpx.AsyncClient(base_url=running.http, trust_env=False) as client:
            status = (await client.get("/status", headers={"X-API-Key": "yap_token"})).json()
            metrics = (await client.get("/metrics")).text
        told = status["engines"]["chat+tool"]
        assert (status["session_tokens"], told["backlog_ms"], told["kv_tokens"]) == (10, 4000, 8000)
        for line in ("connections_max 100.0", "session_tokens 10.0", 'engine_backlog_seconds{engine="chat+tool"} 4.0'):
            assert f"yaptext_{line}" in metrics


async def test_a_lacking_tool_engine_is_told() -> None:
    """TOOL_OPTIONAL: turns go on, each decision says why it is a no, and so does /status; new sockets are welcome."""
    engines = Engines(chat=ScriptedEngine(), tool=None, lacking="the tool engine cannot open x: no memory")
    async with service(engines) as running, running.connect() as socket:
        frames = await turn(socket, "hi")
        check_frames(frames)
        decision = next(f for f in frames if f["type"] == "toolcall")
        assert (decision["status"], decision["raw"], decision["reason"]) == ("no", [], "not_available")
        async with httpx.AsyncClient(base_url=running.http, trust_env=False) as client:
            status = (await client.get("/status", headers={"X-API-Key": "yap_token"})).json()
            assert (status["status"], status["lacking"]) == ("degraded", engines.lacking)
            assert list(status["engines"]) == ["chat"]
            assert (await client.get("/readyz")).json() == {"status": "ready"}


async def test_metrics_count_turns_by_outcome() -> None:
    """One finished, one cancelled, one error code; the histograms have their turn."""
    gate, engine = Gate(), ScriptedEngine()
    async with service(Engines(engine, engine)) as running, running.connect() as socket:
        engine.chat = Script(["a", "b"], pace=gate)
        gate.step(2)
        await turn(socket, "hi")
        await say(socket, "start", session_id="s", user_utterance="again")
        await until(socket, "toolcall")
        await say(socket, "cancel")
        await until(socket, "done")
        await socket.send("{")
        await until(socket, "error")
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"{running.http}/metrics")).text
        for line in (
            'yaptext_turns_total{outcome="finished"} 1.0',
            'yaptext_turns_total{outcome="cancelled"} 1.0',
            'yaptext_errors_total{code="bad_message"} 1.0',
            "yaptext_connections 1.0",
            "yaptext_sessions 1.0",
            'yaptext_engine_requests{engine="chat+tool"} 0.0',
            "yaptext_time_to_first_token_seconds_count 1.0",
        ):
            assert line in text, line
        assert int(re.findall(r"^yaptext_tasks (\d+)", text, re.MULTILINE)[0]) > 3, "receiver, writer, request and test"


async def test_a_dead_engine_fails_its_turns_and_ends_the_process() -> None:
    """Turns in flight get engine_failed, /healthz is 503, and the exit status is not zero."""
    gate, engine = Gate(), ScriptedEngine()
    async with service(Engines(engine, engine)) as running, running.connect() as socket:
        engine.chat = Script(["a", "b"], pace=gate)
        await say(socket, "start", session_id="s", user_utterance="hi")
        await until(socket, "toolcall")
        engine.dead = True
        gate.step()
        assert (await until(socket, "error"))[-1]["error_code"] == "engine_failed"
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{running.http}/healthz")).status_code == 503
        async with asyncio.timeout(60):
            await running.server.lifecycle.exit_requested.wait()
        assert running.server.exit_status == 1


# --- under systemd


async def heard(supervisor: socket.socket, line: str) -> None:
    while line not in (await asyncio.to_thread(supervisor.recv, 4096)).decode().splitlines():
        pass


async def test_ready_is_told_when_the_socket_listens(supervisor: socket.socket) -> None:
    """READY comes after the warm-up turn, and a drain says STOPPING."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        await heard(supervisor, "READY=1")
        assert engine.finished == 2, "one decision and one reply, before anyone was let in"
        running.server.begin_drain()
        await heard(supervisor, "STOPPING=1")


async def test_the_watchdog_is_fed_only_while_the_engines_answer(supervisor: socket.socket) -> None:
    """A hung engine raises nothing; it only stops the feeding."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine), WATCHDOG_USEC=40_000):
        await heard(supervisor, "READY=1")
        await heard(supervisor, "WATCHDOG=1")
        await heard(supervisor, "WATCHDOG=1")
        hung = Gate()
        engine.chat = Script(pace=hung)
        while not hung.waiting:  # noqa: ASYNC110  # the probe has no event
            await asyncio.sleep(0.005)
        supervisor.settimeout(0.3)
        with pytest.raises(TimeoutError):
            await heard(supervisor, "never said")
        hung.step(9)
        supervisor.settimeout(60)
        await heard(supervisor, "WATCHDOG=1")


# --- real vLLM


@pytest.fixture
async def engines(vllm_engine: Engine) -> AsyncIterator[Engines]:
    lent: Any = Borrowed(vllm_engine)
    yield Engines(chat=lent, tool=lent, demo=True)
    assert vllm_engine.load().running == 0, "a test left a stream running"


@pytest.mark.engine
@pytest.mark.parametrize("concurrent", [0, 1])
@pytest.mark.parametrize("history", [None, HISTORY])
async def test_the_demo_knows_the_capital_of_france(engines: Engines, concurrent: int, history: str | None) -> None:
    """A whole turn on the embedded model, in both modes, with and without a history."""
    async with service(engines, CONCURRENT_MODEL_CALL=concurrent) as running, running.connect() as socket:
        frames = await turn(socket, PARIS, history_text=history)
        check_frames(frames)
        assert [f["type"] for f in frames][:2] == ["ack", "toolcall"]
        assert "Paris" in text_of(frames)
        assert frames[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.engine
async def test_the_demo_decides(engines: Engines) -> None:
    """A request for a tool is a yes with arguments that fit its schema; talk is a no."""
    async with service(engines, DEPLOY_MODELS="both") as running, running.connect() as socket:
        asked = await turn(socket, "play some jazz", sampling={"max_tokens": 1})
        (decision,) = [f for f in asked if f["type"] == "toolcall"]
        assert decision["status"] == "yes" and decision["raw"][0]["name"] == "play_music"
        assert set(decision["raw"][0]["arguments"]) == {"query"}
        talked = await turn(socket, "how are you?", sampling={"max_tokens": 1})
        (decision,) = [f for f in talked if f["type"] == "toolcall"]
        assert (decision["status"], decision["raw"]) == ("no", [])
        assert talked[-1]["usage"]["tool_cached_tokens"] > 0, "the fixed tool prompt was primed"


@pytest.mark.engine
@pytest.mark.parametrize("concurrent", [0, 1])
async def test_a_barge_in_and_a_cancel_on_real_vllm(engines: Engines, concurrent: int) -> None:
    """The running turn ends with done cancelled, then the new one answers."""
    async with service(engines, CONCURRENT_MODEL_CALL=concurrent) as running, running.connect() as socket:
        await say(socket, "start", session_id="s", user_utterance="Tell me a very long story about the sea.")
        frames = await until(socket, "token")
        await say(socket, "start", session_id="s", user_utterance=PARIS)
        frames += await until(socket, "done")
        assert frames[-1]["cancelled"] is True and frames[-1]["turn"] == 1
        frames += await until(socket, "token")
        await say(socket, "cancel")
        frames += await until(socket, "done")
        assert frames[-1]["cancelled"] is True and frames[-1]["turn"] == 2
        check_frames(frames)


@pytest.mark.engine
async def test_a_warmed_history_is_found_by_the_turn(engines: Engines) -> None:
    """`cached_tokens` of the turn covers the blocks that `warmed` told."""
    history = "\n".join(f"User: what is {n} plus {n}?\nAssistant: It is {n + n}." for n in range(40))
    async with service(engines) as running, running.connect() as socket:
        await say(socket, "warm_persona", persona_style="scholar")
        await until(socket, "warmed")
        await say(socket, "warm_history", persona_style="scholar", history_text=history)
        warmed = (await until(socket, "warmed"))[-1]
        assert engines.chat is not None
        assert warmed["prefix_tokens"] >= 512 and warmed["prefix_tokens"] % engines.chat.codec.block_size == 0
        frames = await turn(socket, "And 50 plus 50?", persona_style="scholar", history_text=history)
        assert frames[-1]["usage"]["cached_tokens"] >= warmed["prefix_tokens"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("deployed", "kinds"), [("chat", ["ack", "token", "final", "done"]), ("tool", ["ack", "toolcall", "final", "done"])]
)
async def test_one_model_alone(engines: Engines, deployed: str, kinds: list[str]) -> None:
    """Chat-only has no decision, tool-only has no text."""
    alone = Engines(
        chat=engines.chat if deployed == "chat" else None,
        tool=engines.tool if deployed == "tool" else None,
        demo=True,
    )
    async with service(alone, DEPLOY_MODELS=deployed) as running, running.connect() as socket:
        frames = await turn(socket, PARIS)
        assert list(dict.fromkeys(f["type"] for f in frames)) == kinds


@pytest.mark.engine
async def test_two_engines_for_one_checkpoint(state_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SHARE_ENGINE=0: decision and chat on engines of their own, which open at once; where one cannot, nothing of
    either is left."""
    from yaptext.engine.registry import open_engines
    from yaptext.engine.vllm.environment import engine_environment
    from yaptext.settings import Settings

    for name in engine_environment(Settings.load(YAP_TEXT_DEVICE="cpu")):
        monkeypatch.setenv(name, "")
    variables = {
        "YAP_TEXT_STATE_DIR": state_folder,
        "SHARE_ENGINE": 0,
        "YAP_TEXT_DEVICE": "cpu",
        "CPU_KV_CACHE_MB": 512,
    }
    before = set(multiprocessing.active_children())
    with pytest.raises(StartError, match="the chat engine cannot open"):
        open_engines(Settings.load(**variables | {"CPU_KV_CACHE_MB": 128, "TOOL_MAX_MODEL_LEN": 1024}))
    for process in set(multiprocessing.active_children()) - before:
        process.join(60)  # one that was killed, a moment ago
        assert process.exitcode is not None
    two = open_engines(Settings.load(**variables))
    assert len(two.distinct) == 2
    async with service(two, CONCURRENT_MODEL_CALL=1) as running:
        async with running.connect() as socket:
            frames = await turn(socket, PARIS)
            check_frames(frames)
            assert "Paris" in text_of(frames)
        async with httpx.AsyncClient(trust_env=False) as client:
            status = (await client.get(f"{running.http}/status", headers={"X-API-Key": "yap_token"})).json()
        assert set(status["engines"]) == {"chat", "tool"}
    for process in set(multiprocessing.active_children()) - before:
        process.join(60)  # one that was killed, a moment ago
        assert process.exitcode is not None


@pytest.mark.engine
@pytest.mark.timeout(900)  # 200 prompts on whatever CPU this is
async def test_two_hundred_barge_ins_leave_nothing_behind(engines: Engines) -> None:
    """Each gets its done cancelled, no frame comes late, and the engine has nothing left to do."""
    async with service(engines, DEPLOY_MODELS="chat") as running, running.connect() as socket:
        frames: list[Frame] = []
        for _ in range(200):
            await say(socket, "start", session_id="s", user_utterance="Tell me a story.", history_text="")
            if frames:
                frames += await until(socket, "done")
            frames += await until(socket, "token")
        await say(socket, "cancel")
        frames += await until(socket, "done")
        check_frames(frames, decides=False)
        dones = [f for f in frames if f["type"] == "done"]
        assert len(dones) == 200 and all(done["cancelled"] for done in dones)
        await say(socket, "ping")
        assert [f["type"] for f in await until(socket, "pong")] == ["pong"]
        assert engines.chat is not None and engines.chat.load().running == 0
