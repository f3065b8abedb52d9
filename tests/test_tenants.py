"""Keys from outside: a real uvicorn on loopback, and who gets in, how far, and for how long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import websockets
from conftest import Running, service
from fakes import Gate, Script, ScriptedEngine
from structlog.testing import capture_logs
from test_service import closed_with, say, scripted, turn, until

from yaptext.engine.base import Engines
from yaptext.server.access import keyfile

pytestmark = pytest.mark.asyncio(loop_scope="session")
STATIC = {"/client.js", "/client.d.ts", "/playground/app.js", "/playground/style.css", "/playground/icon.svg"}
OPEN = STATIC | {"/healthz", "/livez", "/readyz", "/asyncapi.json", "/openapi.json", "/docs"}
POSTED = ["/ticket", "/playground/prompt", "/v1/chat/completions", "/v1/responses"]
ROUTES = [*sorted(OPEN), *POSTED, "/v1/models", "/v1/models/chat", "/status", "/metrics", "/ws", "/v1", "/nowhere"]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# ours\n")
    return path


@pytest.fixture
def add(file: Path) -> Callable[..., str]:
    """Adds a key to the file, with limits."""

    def added(name: str, limits: str = "") -> str:
        key, _ = keyfile.add(name, file)
        file.write_text(f"{file.read_text().rstrip()} {limits}\n")
        return key

    return added


async def reload(running: Running) -> None:
    await running.server.lifespan.state["service"].keys.reload()


async def ticket_of(running: Running, key: str) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        return str((await client.post(f"{running.http}/ticket", headers={"X-API-Key": key})).json()["ticket"])


def by_ticket(running: Running, ticket: str) -> Any:
    return websockets.connect(f"{running.ws}?ticket={ticket}", proxy=None)


async def pong(socket: Any) -> bool:
    await say(socket, "ping")
    return bool((await until(socket, "pong", "error"))[-1]["type"] == "pong")


async def ask(running: Running, method: str, target: bytes, *headers: bytes) -> tuple[int, bytes]:
    """Status and body of a request that is sent as it is; status 0 where it is cut off before an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.bound_port)
    head = [b"%b %b HTTP/1.1" % (method.encode(), target), b"Host: localhost", b"Connection: close", *headers, b"", b""]
    try:
        async with asyncio.timeout(60):
            writer.write(b"\r\n".join(head))
            answer = await reader.read()
    except ConnectionError:
        return 0, b""
    finally:
        writer.close()
    return int(answer.split()[1] if answer else 0), answer.partition(b"\r\n\r\n")[2]


# --- who gets in


@pytest.fixture(params=["none", "wrong", "empty", "non-ASCII", "1 MB", "removed", "the default", "a hash"])
def unfit(request: pytest.FixtureRequest, file: Path, add: Callable[..., str]) -> bytes | None:
    """What is no key of the file; None: nothing is given at all."""
    before = file.read_text()
    removed = add("removed").encode()
    file.write_text(before)
    return {
        "none": None,
        "wrong": b"wrong",
        "empty": b"",
        "non-ASCII": "schlüssel-🔑".encode(),
        "1 MB": b"k" * 1_000_000,
        "removed": removed,
        "the default": b"yap_token",
        "a hash": file.read_bytes().split(b"sha256:")[1][:64],
    }[request.param]


@pytest.fixture
def kept(file: Path, add: Callable[..., str]) -> str:
    """The key that the file has."""
    return add("kept")


@pytest.mark.parametrize("way", ["header", "bearer", "query"])
async def test_no_route_and_no_method_is_open_to_an_unfit_key(
    file: Path, kept: str, unfit: bytes | None, way: str
) -> None:
    """Every pair answers as its table says: 200 for what needs no key, else a refusal; and the service goes on."""
    query, header = b"", b"X-Nothing: 1"
    if unfit is not None and way == "query":
        query = b"?api_key=" + quote(unfit).encode()
    elif unfit is not None:
        header = {"header": b"X-API-Key: ", "bearer": b"Authorization: Bearer "}[way] + unfit
    too_large = {0, 400, 413, 414, 431} if unfit and len(unfit) > 65_536 else set()
    async with service(scripted(), YAP_TEXT_KEY_FILE=file, FAILED_KEYS_PER_MINUTE=0) as running:
        for path in ROUTES:
            for method in METHODS:
                # From elsewhere, as a proxy on this host says: /metrics is open to callers on loopback.
                status, body = await ask(running, method, path.encode() + query, header, b"X-Forwarded-For: 192.0.2.1")
                if path in ("/ws", "/v1", "/nowhere"):
                    wanted = 404
                elif method not in (["POST"] if path in POSTED else ["GET", "HEAD"]):
                    wanted = 405
                else:
                    wanted = 200 if path in OPEN else 401
                assert status == wanted or status in too_large, (method, path, status)
                if status == 401 and method != "HEAD":
                    refused = json.loads(body)
                    code = refused["error"]["code"] if path.startswith("/v1") else refused["error_code"]
                    assert code in ("authentication_failed", "invalid_api_key")
        async with running.connect(kept) as socket:
            assert await pong(socket)


@pytest.mark.parametrize("way", ["api_key", "ticket", "header", "bearer"])
async def test_no_unfit_key_opens_a_conversation(file: Path, kept: str, unfit: bytes | None, way: str) -> None:
    """It is told and closed with 1008; a handshake that is over the library's limits fails as one."""
    query, headers = "", {}
    if unfit is not None and way in ("api_key", "ticket"):
        query = f"?{way}={quote(unfit)}"
    elif unfit is not None:
        name, prefix = {"header": ("X-API-Key", ""), "bearer": ("Authorization", "Bearer ")}[way]
        headers[name] = prefix + unfit.decode("latin-1")
    async with service(scripted(), YAP_TEXT_KEY_FILE=file, FAILED_KEYS_PER_MINUTE=0) as running:
        try:
            async with websockets.connect(
                running.ws + query, additional_headers=headers, proxy=None, open_timeout=60
            ) as socket:
                (refusal,) = await until(socket, "error")
                assert refusal["error_code"] == "authentication_failed" and await closed_with(socket) == 1008
        except (OSError, TimeoutError, websockets.InvalidHandshake, websockets.InvalidMessage):
            assert unfit and len(unfit) > 65_536
        assert running.active == 0
        async with running.connect(kept) as socket:
            assert await pong(socket)


async def test_two_keys_cannot_reach_each_others_sessions(file: Path, add: Callable[..., str]) -> None:
    """The same session_id under two names is two conversations: no transcript, no persona, no turn in common."""
    a, b = add("a"), add("b")
    engine = ScriptedEngine()
    async with service(Engines(engine, engine), YAP_TEXT_KEY_FILE=file) as running:
        async with running.connect(a) as first, running.connect(b) as second:
            await turn(first, "my secret is blue", persona_style="savage")
            theirs = await turn(second, "what is my secret?")
            assert theirs[0]["turn"] == 1 and theirs[0]["persona_style"] == "wholesome"
            prompt = engine.decode(engine.requests[-1][0])
            assert "what is my secret" in prompt and "blue" not in prompt
            engine.chat = Script(["x", "y"], pace=(gate := Gate()))
            await say(first, "start", session_id="s", user_utterance="hi")
            await until(first, "toolcall")
            await say(second, "cancel", heard_chars=0)
            assert (await until(second, "done"))[-1]["turn"] == 0
            await say(second, "set_persona", session_id="s", persona_style="chill")
            await until(second, "ack")
            gate.step(5)
            assert (await until(first, "done"))[-1].get("cancelled") is None
            assert (await turn(first, "again"))[0]["persona_style"] == "savage"


async def test_with_a_key_file_the_default_key_is_off_and_an_own_one_is_not(
    file: Path, add: Callable[..., str]
) -> None:
    """The rule that keeps the default key on loopback has nothing left to keep."""
    named = add("a")
    for own, works in ((None, False), ("own", True)):
        variables = {} if own is None else {"YAP_TEXT_API_KEY": own}
        async with service(scripted(), YAP_TEXT_KEY_FILE=file, HOST="127.0.0.1", **variables) as running:
            async with httpx.AsyncClient(base_url=running.http, trust_env=False) as client:
                for key, status in ((own or "yap_token", 200 if works else 401), (named, 200)):
                    assert (await client.get("/status", headers={"X-API-Key": key})).status_code == status


@pytest.mark.parametrize("per_key", [0, 1])
async def test_a_cached_persona_is_told_to_its_own_key(file: Path, add: Callable[..., str], per_key: int) -> None:
    """With CACHE_PER_KEY to that alone: neither warming nor a turn of another key, whose decisions share the tool
    prompt as before, finds it."""
    a, b = add("a"), add("b")
    engine = ScriptedEngine()
    persona = {"persona_text": "You are Ada, who counts all that there is. " * 5}
    async with service(Engines(engine, engine), YAP_TEXT_KEY_FILE=file, CACHE_PER_KEY=per_key) as running:
        async with running.connect(a) as first, running.connect(b) as second:
            cached = []
            for socket in (first, first, second):
                await say(socket, "warm_persona", **persona)
                cached.append((await until(socket, "warmed"))[-1]["cached_tokens"])
            assert cached[0] == 0 < cached[1] and cached[2] == (0 if per_key else cached[1])
            said = {"persona_text": "You were never said to anybody. " * 9}
            for socket, finds in ((first, False), (second, not per_key), (second, True)):
                usage = (await turn(socket, "hi", history_text="", **said))[-1]["usage"]
                assert (usage["cached_tokens"] > 50) == finds and usage["tool_cached_tokens"] > 50


# --- reload


async def test_sighup_takes_the_new_file_and_drops_only_removed_keys(file: Path, add: Callable[..., str]) -> None:
    """A running turn of a key that stays goes on; the sockets of the removed one hear why, 1008; a new key gets in."""
    stays, goes = add("stays"), add("goes")
    engine, gate = ScriptedEngine(), Gate()
    async with service(Engines(engine, engine), YAP_TEXT_KEY_FILE=file) as running:
        engine.chat = Script(["a", "b"], pace=gate)
        ticket = await ticket_of(running, goes)
        async with running.connect(stays) as live, running.connect(goes) as dead, by_ticket(running, ticket) as guest:
            await say(live, "start", session_id="s", user_utterance="hi")
            await until(live, "toolcall")
            await say(dead, "start", session_id="s", user_utterance="hi")
            await until(dead, "toolcall")
            file.write_text(file.read_text().partition("goes ")[0])  # noqa: ASYNC240
            comes = add("comes")
            os.kill(os.getpid(), signal.SIGHUP)
            frames = await until(dead, "error")
            assert [f["type"] for f in frames] == ["done", "error"] and frames[0]["cancelled"] is True
            assert frames[1]["error_code"] == "authentication_failed" and "removed" in frames[1]["message"]
            assert await closed_with(dead) == 1008 and await closed_with(guest) == 1008
            gate.step(5)
            assert (await until(live, "done"))[-1].get("cancelled") is None
            async with running.connect(comes) as new:
                assert await pong(new)
            async with running.connect(goes) as late:
                assert (await until(late, "error"))[-1]["error_code"] == "authentication_failed"


async def test_sighup_with_a_broken_file_changes_nothing(file: Path, add: Callable[..., str]) -> None:
    """One error line; every socket and every key stays."""
    key = add("a")
    async with service(scripted(), YAP_TEXT_KEY_FILE=file) as running, running.connect(key) as socket:
        file.write_text("broken\n")  # noqa: ASYNC240
        with capture_logs() as lines:
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(60):
                while not any(line["event"] == "keys.refused" for line in lines):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert [line["log_level"] for line in lines if line["event"].startswith("keys.")] == ["error"]
        assert await pong(socket)
        async with running.connect(key) as another:
            assert await pong(another)


# --- limits


@pytest.mark.parametrize(
    ("limit", "frame", "ending", "act"),
    [
        ("turns_per_minute=2", {"type": "start", "session_id": "s", "user_utterance": "hi"}, "done", "turns"),
        ("turns_per_minute=2", {"type": "warm_persona", "persona_style": "chill"}, "warmed", "turns"),
        ("cancels_per_minute=2", {"type": "cancel"}, "done", "cancels"),
        ("messages_per_minute=2", {"type": "ping"}, "pong", "messages"),
    ],
)
async def test_a_key_over_its_rate_is_told_and_stays(
    file: Path, add: Callable[..., str], limit: str, frame: dict[str, str], ending: str, act: str
) -> None:
    """Counted over all its sockets; another key goes on, and so does this one as soon as its limit lets it."""
    a, b = add("a", limit), add("b")
    async with service(scripted(), YAP_TEXT_KEY_FILE=file) as running:
        async with running.connect(a) as first, running.connect(a) as second, running.connect(b) as other:
            for socket in (first, second):
                await socket.send(json.dumps(frame))
                await until(socket, ending)
            await first.send(json.dumps(frame))
            refusal = (await until(first, "error"))[-1]
            assert refusal["error_code"] == "rate_limited" and f"out of {act}; limit is 2" in refusal["message"]
            assert 0 < refusal["retry_after_ms"] <= 30_000
            await other.send(json.dumps(frame))
            assert (await until(other, ending, "error"))[-1]["type"] == ending
            file.write_text(file.read_text().replace(limit, ""))  # noqa: ASYNC240
            await reload(running)
            await first.send(json.dumps(frame))
            assert (await until(first, ending, "error"))[-1]["type"] == ending


async def test_a_key_over_its_connections_is_told_and_closed(file: Path, add: Callable[..., str]) -> None:
    """With when to come again, 1013; a slot that is left is free at once."""
    a, b = add("a", "connections=1"), add("b")
    async with service(scripted(), YAP_TEXT_KEY_FILE=file) as running:
        async with running.connect(a) as first:
            async with running.connect(a) as second:
                (refusal,) = await until(second, "error")
                assert refusal["error_code"] == "rate_limited" and refusal["retry_after_ms"] > 0
                assert "1 connections; limit is 1" in refusal["message"] and await closed_with(second) == 1013
            async with running.connect(b) as other:
                assert await pong(other)
            await say(first, "end")
            await closed_with(first)
        async with running.connect(a) as third:
            assert await pong(third)


async def test_a_chatty_user_who_barges_in_meets_no_limit(file: Path, add: Callable[..., str]) -> None:
    """A turn, a cancel and a new turn ten times a second for seconds, under the defaults."""
    key = add("a")
    async with service(scripted(), YAP_TEXT_KEY_FILE=file) as running, running.connect(key) as socket:
        for number in range(1, 101):
            await say(socket, "start", session_id="s", user_utterance="hi")
            await say(socket, "cancel")
            await say(socket, "start", session_id="s", user_utterance="no, wait")
            async with asyncio.timeout(60):
                while (frame := json.loads(await socket.recv())).get("turn") != 2 * number or frame["type"] != "done":
                    assert frame["type"] != "error", frame


# --- guessing


async def test_who_guesses_is_told_to_wait(file: Path, add: Callable[..., str]) -> None:
    """429 with Retry-After over HTTP, `rate_limited` over a socket; a named key gets in all the same."""
    key = add("a")
    options = {"YAP_TEXT_KEY_FILE": file, "FAILED_KEYS_PER_MINUTE": 2, "YAP_TEXT_API_KEY": "own"}
    options["TRUSTED_PROXIES"] = "127.0.0.1"
    async with service(scripted(), **options) as running:
        async with httpx.AsyncClient(base_url=running.http, trust_env=False) as client:

            async def ask(key: str, **headers: str) -> httpx.Response:
                return await client.get("/status", headers={"X-API-Key": key, **headers})

            assert [(await ask("wrong")).status_code for _ in range(3)] == [401, 401, 429]
            refused = await ask("own")
            assert refused.status_code == 429 and 0 < int(refused.headers["Retry-After"]) <= 30
            assert refused.json()["error_code"] == "rate_limited"
            assert (await ask(key)).status_code == 200
            # Another client, as the proxy on this host says.
            assert (await ask("own", **{"X-Forwarded-For": "192.0.2.1"})).status_code == 200
            assert (await client.get("/status")).status_code == 401
        async with running.connect("wrong") as socket:
            (refusal,) = await until(socket, "error")
            assert refusal["error_code"] == "rate_limited" and refusal["retry_after_ms"] > 0
            assert await closed_with(socket) == 1013
        async with running.connect(key) as socket:
            assert await pong(socket)


# --- tickets


async def test_a_ticket_opens_one_conversation_of_its_key(file: Path, add: Callable[..., str]) -> None:
    """With the sessions of the key's name; the second time it is refused, and nothing caches it."""
    key = add("a")
    async with service(scripted(), YAP_TEXT_KEY_FILE=file) as running:
        async with running.connect(key) as socket:
            await turn(socket, "hi")
        async with httpx.AsyncClient(trust_env=False) as client:
            given = await client.post(f"{running.http}/ticket", headers={"Authorization": f"Bearer {key}"})
            assert given.headers["Cache-Control"] == "no-store" and given.json()["expires_in_s"] == 60
            in_address = await client.post(f"{running.http}/ticket", params={"api_key": key})
            assert in_address.status_code == 401
        async with by_ticket(running, given.json()["ticket"]) as socket:
            assert (await turn(socket, "hi"))[0]["turn"] == 2
        async with by_ticket(running, given.json()["ticket"]) as socket:
            assert (await until(socket, "error"))[-1]["error_code"] == "authentication_failed"
            assert await closed_with(socket) == 1008


# --- origins


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("https://app.example.com", True),
        ("https://APP.example.com", True),
        ("http://localhost:3000", True),
        ("https://app.example.com:8443", False),
        ("http://app.example.com", False),
        ("https://app.example.com.evil.example", False),
        ("null", False),
    ],
)
async def test_only_pages_of_allowed_origins_connect(origin: str | None, allowed: bool) -> None:
    """A client without an origin is no page. The refusal names the rule, before any key is looked at."""
    origins = "https://app.example.com/, http://localhost:3000"
    async with service(scripted(), ALLOWED_ORIGINS=origins, FAILED_KEYS_PER_MINUTE=1) as running:
        for _ in range(2):
            async with running.connect(origin=origin) as socket:
                if allowed:
                    assert await pong(socket)
                else:
                    (refusal,) = await until(socket, "error")
                    assert refusal["error_code"] == "authentication_failed"
                    assert "ALLOWED_ORIGINS" in refusal["message"] and origin in refusal["message"]
                    assert await closed_with(socket) == 1008


async def test_with_a_key_of_ones_own_any_origin_connects() -> None:
    """Unless ALLOWED_ORIGINS names some. Of the default key: `server/test_door.py`."""
    async with service(scripted(), YAP_TEXT_API_KEY="own") as running:
        async with running.connect("own", origin="https://anywhere.example") as socket:
            assert await pong(socket)


# --- what is told


async def test_logs_and_metrics_have_names_and_no_keys(
    file: Path, add: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither a key nor a ticket nor a wrong attempt, from handshakes, turns, refusals and a reload."""
    key, wrong = add("phone-app"), "a-wrong-attempt"
    with capture_logs() as lines:
        async with service(scripted(), YAP_TEXT_KEY_FILE=file) as running:
            ticket = await ticket_of(running, key)
            for uri in (f"?api_key={key}", f"?ticket={ticket}", f"?api_key={wrong}", f"?ticket={wrong}"):
                async with websockets.connect(running.ws + uri, proxy=None) as socket:
                    if wrong in uri:
                        await until(socket, "error")
                    else:
                        await say(socket, "end")
                    await closed_with(socket)
            await reload(running)
            async with httpx.AsyncClient(trust_env=False) as client:
                text = (await client.get(f"{running.http}/metrics")).text
    assert [line["key"] for line in lines if line["event"] == "connection.closed"] == ["phone-app"] * 2
    told = json.dumps(lines, default=str) + text + "".join(capfd.readouterr())
    assert "yaptext_connections" in told and "keys.loaded" in told
    for secret in (key, ticket, wrong):
        assert secret not in told
