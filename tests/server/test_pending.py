"""server/pending.py: what a connection without a slot may do, and that one that is gone holds nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Running, service, until
from fakes import Script, ScriptedEngine
from fuzz.target import PING, TEXT, Client, Target, frame, target, watched
from structlog.testing import capture_logs

from yaptext.engine.base import Engines
from yaptext.server import pending

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
KEY = b"X-API-Key: yap_token\r\n"
START = frame(TEXT, b'{"type":"start","session_id":"s","user_utterance":"hi"}')
END = frame(TEXT, b'{"type":"end"}')
POLL = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def scripted(**options: Any) -> Engines:
    engine = ScriptedEngine(**options)
    return Engines(chat=engine, tool=engine)


class Peer:
    """A TCP connection to the service, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def head(self) -> bytes:
        async with asyncio.timeout(60):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def rest(self) -> bytes:
        """All until the service closes."""
        async with asyncio.timeout(60):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def read_no_more(self) -> None:
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]


@asynccontextmanager
async def peer_of(running: Running, opening: bytes = b"", address: str = "127.0.0.1") -> AsyncIterator[Peer]:
    port = running.server.bound_port
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    writer.write(opening)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def waiting(running: Running) -> int:
    return len(running.server.lifespan.state["service"].pending)


# --- how long


async def _silent(peer: Peer) -> None:
    pass


async def _drip(peer: Peer) -> None:
    peer.say(b"GET /healthz HTTP/1.1\r\n")
    while not peer.writer.is_closing():
        peer.say(b"X-Slow: 1\r\n")
        await asyncio.sleep(0.05)


async def _drip_body(peer: Peer) -> None:
    """Its answer comes before its body is whole."""
    peer.say(b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
    while not peer.writer.is_closing():
        peer.say(b"x")
        await asyncio.sleep(0.05)


async def _keep_alive(peer: Peer) -> None:
    peer.say(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")


async def _refused(peer: Peer) -> None:
    """It is told 1008, and stays."""
    peer.say(HANDSHAKE + b"\r\n")


@pytest.mark.parametrize("behave", [_silent, _drip, _drip_body, _keep_alive, _refused])
async def test_a_connection_without_a_slot_is_cut_off(behave: Callable[[Peer], Awaitable[None]]) -> None:
    """After HANDSHAKE_TIMEOUT_S, whatever it says meanwhile."""
    async with service(scripted(), HANDSHAKE_TIMEOUT_S=1) as running:
        async with peer_of(running) as peer:
            behaving = asyncio.create_task(behave(peer))
            await until(lambda: waiting(running) == 1)
            await peer.rest()
            assert waiting(running) == 0 and not running.server.server_state.connections
        await behaving


async def test_a_slot_has_no_such_limit() -> None:
    """A conversation goes on, and so does HTTP that asks again in time, however much in all."""
    async with service(scripted(), HANDSHAKE_TIMEOUT_S=2) as running, running.connect() as socket:
        async with peer_of(running) as peer:
            for _ in range(3):
                peer.say(b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 30_000 + b"\r\n\r\n")
                assert b" 200 " in await peer.head()
                await peer.reader.readexactly(15)
                await asyncio.sleep(0.8)
            assert waiting(running) == 1
        await socket.send('{"type":"ping"}')
        assert json.loads(await socket.recv())["type"] == "pong"


@pytest.mark.parametrize("last", [START, END], ids=["a reply too long for it", "its own end"])
async def test_who_was_closed_and_does_not_go_is_cut_off(last: bytes) -> None:
    """Its slot is free at once; its descriptor and what it never read after HANDSHAKE_TIMEOUT_S."""
    flood = Script(("x" * 60_000,) * 200)
    async with service(scripted(chat=flood), HANDSHAKE_TIMEOUT_S=2) as running:
        async with peer_of(running, HANDSHAKE + KEY + b"\r\n") as peer:
            peer.read_no_more()
            await until(lambda: running.active == 1)
            (protocol,) = running.server.server_state.connections
            protocol.close_timeout = 1000  # type: ignore[union-attr]  # uvicorn's own way to end the second of the two
            peer.say(last)
            await until(lambda: running.active == 0)
            assert len(running.server.server_state.connections) == 1, "the close is not yet read"
            await until(lambda: not running.server.server_state.connections)


# --- how many


async def test_over_the_limit_the_oldest_is_cut_off() -> None:
    """Connections that say nothing lock nobody out."""
    async with service(scripted(), MAX_PENDING_HANDSHAKES=3) as running, running.connect() as slot:
        async with AsyncExitStack() as stack:
            silent = [await stack.enter_async_context(peer_of(running)) for _ in range(9)]
            assert [await peer.rest() for peer in silent[:6]] == [b""] * 6
            assert waiting(running) == 3
            async with running.connect() as newcomer:
                for socket in (slot, newcomer):
                    await socket.send('{"type":"ping"}')
                    assert json.loads(await socket.recv())["type"] == "pong"


@pytest.mark.parametrize("poll", [POLL, POLL.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), b""])
async def test_who_comes_again_and_again_pushes_nobody_else_out(poll: bytes) -> None:
    """More than there are places, which ask, ask and go, or say nothing, and come back as soon as they are cut off. Ten
    handshakes from elsewhere may take their time."""
    async with service(scripted(), MAX_PENDING_HANDSHAKES=24) as running:
        came = [0]

        async def keep_coming() -> None:
            while True:
                async with peer_of(running, poll) as peer:
                    came[0] += 1
                    with suppress(OSError, asyncio.IncompleteReadError):
                        while True:
                            await peer.head()
                            await peer.reader.readexactly(15)
                            came[0] += 1
                            peer.say(poll)

        async def shake_hands_slowly() -> bytes:
            async with peer_of(running, address="127.0.0.2") as peer:
                for part in re.findall(b".{1,25}", HANDSHAKE + KEY + b"\r\n", re.DOTALL):
                    peer.say(part)
                    await asyncio.sleep(0.05)
                with suppress(ConnectionError, asyncio.IncompleteReadError):
                    return await peer.head()
                return b""

        pollers = [asyncio.create_task(keep_coming()) for _ in range(26)]
        try:
            await until(lambda: came[0] > 100)
            found = await asyncio.gather(*(shake_hands_slowly() for _ in range(10)))
        finally:
            for poller in pollers:
                poller.cancel()
            await asyncio.wait(pollers)
        assert [b" 101 " in head for head in found] == [True] * 10


async def test_those_that_were_answered_are_cut_off_first() -> None:
    """The oldest of them, which asking again does not make younger; then the oldest of the address that has most.
    Leaving is for good."""
    cut: list[str] = []

    class Transport:
        def __init__(self, name: str) -> None:
            self.name = name

        def get_extra_info(self, _: str) -> tuple[str, int]:
            return ("192.0.2.1" if self.name in "def" else "192.0.2.2", 1)

        def abort(self) -> None:
            cut.append(self.name)

    room = pending.PendingConnections(3, 60)
    a, b, c, d, e, f = (Transport(name) for name in "abcdef")
    for transport in (a, b, c):
        room.enter(transport)  # type: ignore[arg-type]
    for transport in (b, c, b):
        room.enter(transport, answered=True)  # type: ignore[arg-type]
    assert len(room) == 3 and not cut
    for transport in (d, e, f):
        room.enter(transport)  # type: ignore[arg-type]
    assert cut == ["b", "c", "d"] and len(room) == 3
    for transport in (a, e, f):
        room.leave(transport)  # type: ignore[arg-type]
    assert len(room) == 0 and not room.crowds


def test_descriptors_bound_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process raises its own limit as far as it may. What does not fit then are first those without a slot, down
    to an eighth, then those with one; one of each there may always be."""
    limits = [(100, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    used = len(os.listdir("/proc/self/fd")) + 64
    assert pending.fitting(300, 200) == (300, 200)
    assert limits[-1][0] >= used + 500 and limits[-1][1] == 1000
    free = 1000 - used
    assert pending.fitting(500, 5000) == (500, pytest.approx(free - 500, abs=5))
    assert pending.fitting(5000, 5000) == (pytest.approx(free * 7 / 8, abs=5), pytest.approx(free / 8, abs=5))
    assert pending.fitting(5000, 10) == (pytest.approx(free - 10, abs=5), 10)
    assert limits[-1] == (1000, 1000)
    limits[:] = [(10, 10)]
    assert pending.fitting(5000, 5000) == pending.fitting(1, 1) == (1, 1)


async def test_status_and_a_warning_tell_what_descriptors_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what MAX_CONCURRENT_CONNECTIONS asks for; the warning names both."""
    limit = len(os.listdir("/proc/self/fd")) + 64 + 40
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: None)
    with capture_logs() as lines:
        async with service(scripted(), MAX_CONCURRENT_CONNECTIONS=500) as running:
            async with httpx.AsyncClient(base_url=running.http, trust_env=False) as client:
                status = (await client.get("/status", headers={"X-API-Key": "yap_token"})).json()
    (warning,) = [line for line in lines if line["event"] == "files.short"]
    assert 20 < status["connections"]["max"] == warning["max_connections"] < 40
    assert f"at most {limit} files" in warning["hint"] and "500 connections" in warning["hint"]


# --- how much


@pytest.mark.parametrize(
    "request_, status",
    [
        (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 8_000, 431),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 100_000, 400),
        (b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 100_000, 400),
        (b"GET /healthz?" + b"y" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /healthz HTTP/1.1\r\nConnection: " + b"a," * 1000 + b"\r\n\r\n", 431),
        (b"POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1000, 400),
        (b"GET /nowhere HTTP/1.1\r\n\r\n" * 1000, 400),
        (HANDSHAKE + KEY + b"Content-Length: 5\r\n\r\nhello", 400),
        (HANDSHAKE.replace(b"/ws", b"/ws\xe9") + KEY + b"\r\n", 400),
        (HANDSHAKE + KEY + b"X: y\r\n" * 200 + b"\r\n", 431),
        (HANDSHAKE + KEY + b"X: " + b"y" * 9000 + b"\r\n\r\n", 431),
        (HANDSHAKE.replace(b"/ws", b"/ws?" + b"y" * 9000) + KEY + b"\r\n", 414),
    ],
    ids=[
        "many headers",
        "a long header",
        "a body",
        "an address",
        "a long Connection",
        "a body in pieces",
        "pipelined",
        "a handshake with a body",
        "a handshake with another address",
        "a handshake's headers",
        "a handshake's header",
        "a handshake's query",
    ],
)
async def test_a_request_over_the_bounds_is_refused(request_: bytes, status: int) -> None:
    """At once, and the connection closed."""
    async with service(scripted()) as running, peer_of(running, request_) as peer:
        assert b"HTTP/1.1 %d " % status in await peer.rest()
        await until(lambda: not running.server.server_state.connections)


async def test_a_handshake_may_be_longer_than_one_read() -> None:
    """Three cookies of 7 KB are within the library's bounds: 128 headers of 8 KB."""
    cookies = b"".join(b"Cookie: c%d=" % n + b"y" * 7000 + b"\r\n" for n in range(3))
    async with service(scripted()) as running, peer_of(running, HANDSHAKE + KEY + cookies + b"\r\n") as peer:
        assert b" 101 " in await peer.head()
        peer.say(END)
        assert await peer.rest()


async def test_bad_requests_do_not_fill_the_log() -> None:
    """Ten lines a minute of each status, and none of uvicorn's own."""
    logger = logging.getLogger("uvicorn.error")
    heard: list[logging.LogRecord] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = heard.append  # type: ignore[method-assign]
    logger.addHandler(listener)
    try:
        with capture_logs() as lines:
            async with service(scripted()) as running:
                for _ in range(20):
                    async with peer_of(running, b"GARBAGE\r\n\r\n") as peer:
                        assert b" 400 " in await peer.rest()
                    async with peer_of(
                        running, b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
                    ) as peer:
                        assert b" 404 " in await peer.head()
    finally:
        logger.removeHandler(listener)
    refused = [line for line in lines if line["event"] == "request.refused"]
    assert len(refused) < 10 and {(line["status"], line["address"]) for line in refused} == {(400, "127.0.0.0/24")}
    assert not heard


# --- who has gone


async def test_a_client_that_answers_no_ping_has_gone() -> None:
    """Its slot is free within twice PING_INTERVAL_S, also where it left something unread; who answers stays."""
    long = Script(("x" * 60_000,) * 200)
    async with service(scripted(chat=long), PING_INTERVAL_S=1, SEND_QUEUE_BYTES=10**8) as running:
        opening = HANDSHAKE + KEY + b"\r\n"
        async with running.connect() as alive, peer_of(running, opening), peer_of(running, opening) as deaf:
            await until(lambda: running.active == 3)
            deaf.read_no_more()
            deaf.say(START)
            await until(lambda: running.active == 1)
            await asyncio.sleep(2.5)
            assert running.active == 1
            await alive.send('{"type":"ping"}')
            assert json.loads(await alive.recv())["type"] == "pong"


# --- what would fill the memory: the service in its own process


def _ping_flood(client: Client, aim: Target) -> None:
    """Pings, and no pong is read."""
    client.send(frame(PING, b"x" * 125) * 400_000)


def _fragments(client: Client, aim: Target) -> None:
    """A message that never ends, of empty fragments."""
    client.send(frame(TEXT, b"", fin=False) + frame(0, b"", fin=False) * 3_000_000)
    assert not list(client.messages()) and client.close_code == 1009


def _unread(client: Client, aim: Target) -> None:
    """A reply of 16 MB, and nothing is read."""
    client.say("start", session_id="s", user_utterance="flood", sampling={"max_tokens": 4096})
    until = time.monotonic() + 60
    while not (closed := aim.lines("connection.closed")):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert [line["code"] for line in closed] == [4001]


def _after_the_close(client: Client, aim: Target) -> None:
    """All that the connection takes, once `end` was said."""
    client.say("end")
    with suppress(OSError):
        while True:
            client.socket.sendall(frame(PING, b"") * 10_000)


@pytest.mark.subprocess
@pytest.mark.parametrize("attack", [_ping_flood, _fragments, _unread, _after_the_close])
def test_memory_is_bounded(tmp_path: Path, attack: Callable[[Client, Target], None]) -> None:
    """Whatever one client sends and does not read; another is served meanwhile."""
    with target(tmp_path, HANDSHAKE_TIMEOUT_S=2) as aim:
        before = aim.inside()["rss_mb"]
        with watched(aim) as sentinel:
            client = Client(aim.port)
            attack(client, aim)
        grown = aim.inside()["peak_mb"] - before
        client.close()
        assert not aim.complaints()
    print(f"\n{attack.__name__}: {grown:.1f} MB; {sentinel}")
    assert grown < 16 and max(sentinel.waits) < 5


# --- no descriptors left


@pytest.mark.subprocess
def test_the_service_outlives_a_lack_of_descriptors(tmp_path: Path) -> None:
    """More connections than the process may have files: those with a slot are served, others are cut off, the journal
    has a line of each kind, and newcomers are welcome."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150));"
        f"sys.argv[0] = {str(Path(__file__).parents[1] / 'fuzz/served.py')!r};"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with target(tmp_path, command=[sys.executable, "-c", code]) as aim:
        with watched(aim):
            silent = [Client(aim.port, upgrade=False) for _ in range(500)]
            newcomer = Client(aim.port)
            newcomer.say("ping")
            assert newcomer.until("pong")
        for client in [*silent, newcomer]:
            client.close()
        assert len(aim.lines("files.short")) == 1 and len(aim.lines("pending.full")) == 1
        assert not aim.complaints()
