"""What clients are answered while the engines open, on real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
import websockets
from conftest import Running
from documented import body_fault
from fakes import ScriptedEngine

from yaptext import __version__
from yaptext.engine.base import Engines
from yaptext.engine.underway import Underway
from yaptext.errors import StartError
from yaptext.server import opening as opening_module
from yaptext.server.app import create_app
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.opening import Opening
from yaptext.server.process import Server
from yaptext.server.record import Record
from yaptext.settings import Settings


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def ask(listener: socket.socket, head: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and body."""
    with socket.create_connection(listener.getsockname(), timeout=10) as client:
        client.sendall(head)
        return answer(client)


def answer(client: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    text = b""
    while came := client.recv(10_000):
        text += came
    head, _, body = text.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert int(dict(line.split(": ") for line in lines)["Content-Length"]) == len(body)
    found = json.loads(body)
    assert body_fault("Starting", found) is None
    return int(first.split()[1]), dict(line.split(": ") for line in lines), found


@pytest.mark.parametrize("path", ["/readyz", "/healthz", "/ws?api_key=k", "/status", "/"])
def test_who_comes_during_a_start_is_told_when_to_come_back(listener: socket.socket, path: str) -> None:
    """503, with what the last start took; no key is asked for."""
    with Opening([listener], expected_s=28.4):
        status, headers, body = ask(listener, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert status == 503 and 27 <= int(headers["Retry-After"]) <= 29
    assert (body["status"], body["error_code"]) == ("starting", "going_away")
    assert body["retry_after_ms"] == int(headers["Retry-After"]) * 1000


def test_a_process_that_starts_is_alive(listener: socket.socket) -> None:
    """Otherwise a liveness check would kill it during its start."""
    with Opening([listener], expected_s=None):
        status, _, body = ask(listener, b"GET /livez HTTP/1.1\r\n\r\n")
    assert (status, body["status"]) == (200, "starting")


def test_a_websocket_client_sees_a_503(listener: socket.socket) -> None:
    """As its library has it: with status, header and body."""
    from websockets.sync.client import connect

    with Opening([listener], expected_s=60.0), pytest.raises(websockets.InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{listener.getsockname()[1]}/ws", proxy=None)
    response = refused.value.response
    assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 59
    assert json.loads(response.body)["error_code"] == "going_away"


def test_a_head_that_comes_in_pieces_or_is_too_large_is_answered(listener: socket.socket) -> None:
    with Opening([listener], expected_s=None):
        with socket.create_connection(listener.getsockname(), timeout=10) as client:
            for piece in (b"GET /rea", b"dyz HTTP/1.1\r\nHost: a\r\n", b"\r\n"):
                client.sendall(piece)
                time.sleep(0.02)
            assert answer(client)[0] == 503
        assert ask(listener, b"GET / HTTP/1.1\r\nCookie: " + b"c" * 30_000)[0] == 503


def test_silent_clients_keep_nobody_out(listener: socket.socket) -> None:
    """The oldest of them make room."""
    with Opening([listener], expected_s=None), ExitStack() as silent:
        for _ in range(400):
            silent.enter_context(socket.create_connection(listener.getsockname(), timeout=10))
        assert ask(listener, b"GET /readyz HTTP/1.1\r\n\r\n")[0] == 503


def test_who_is_still_there_when_the_engines_are_open_is_answered_too(listener: socket.socket) -> None:
    with ExitStack() as opened:
        opening = opened.enter_context(Opening([listener], expected_s=None))
        with socket.create_connection(listener.getsockname(), timeout=10) as client:
            client.sendall(b"GET /readyz HTTP/1.1\r\n")
            time.sleep(0.2)
            opened.close()
            assert answer(client)[0] == 503
    assert not opening.thread.is_alive()


@pytest.mark.parametrize(
    ("expected_s", "passed_s", "told"),
    [(28.0, 0.0, 28), (28.0, 20.5, 7), (28.0, 27.5, 2), (28.0, 100.0, 25), (None, 0.0, 15), (None, 100.0, 15)],
)
def test_the_wait_shrinks_with_the_start(expected_s: float | None, passed_s: float, told: int) -> None:
    """A start that takes longer than the last one is asked again after a part of its time."""
    opening = Opening([], expected_s)
    opening.begun -= passed_s
    assert opening.retry_after_s in (told, told + 1)


async def test_the_service_answers_from_its_start_on(tmp_path: Path) -> None:
    """Engines that hold the loop while they open; then it serves, and the next start knows how long this one took."""
    engine = ScriptedEngine()
    seen: list[httpx2.Response] = []

    def open_engines(_: Settings) -> Engines:
        port = bound[0].getsockname()[1]
        seen.append(httpx2.get(f"http://127.0.0.1:{port}/readyz"))
        time.sleep(0.3)
        return Engines(engine, engine)

    bound = [socket.create_server(("127.0.0.1", 0))]
    settings, lifecycle = Settings.load(PORT=0, YAP_TEXT_STATE_DIR=tmp_path), Lifecycle()
    server = Server(create_app(settings, open_engines=open_engines, lifecycle=lifecycle), settings, lifecycle)
    task = asyncio.create_task(server._serve(bound))
    while not server.started:
        assert not task.done(), task.result()
        await asyncio.sleep(0.01)
    try:
        async with httpx2.AsyncClient() as client:
            assert (await client.get(f"{Running(server).http}/readyz")).json() == {"status": "ready"}
    finally:
        lifecycle.exit_requested.set()
        await task
    assert [response.status_code for response in seen] == [503]
    assert 0.3 <= lifecycle.start_s < 60
    record = Record(tmp_path, settings.models, __version__)
    assert record.last_seconds == pytest.approx(lifecycle.start_s, abs=0.06) and record.after == "a stop"


async def test_a_port_that_is_taken_is_told_before_the_engines_open(listener: socket.socket) -> None:
    """They take minutes."""

    def open_engines(_: Settings) -> Engines:
        raise AssertionError("they were opened")

    settings, lifecycle = Settings.load(PORT=listener.getsockname()[1]), Lifecycle()
    server = Server(create_app(settings, open_engines=open_engines, lifecycle=lifecycle), settings, lifecycle)
    with pytest.raises(StartError, match=f"PORT={settings.port}.*in use"):
        await server._serve()


BROWSER = "Accept: text/html,application/xhtml+xml,*/*;q=0.8"


def page(listener: socket.socket, head: str) -> tuple[str, str]:
    """Head and body."""
    with socket.create_connection(listener.getsockname(), timeout=10) as client:
        client.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        text = b""
        while came := client.recv(10_000):
            text += came
    found, _, body = text.decode().partition("\r\n\r\n")
    return found, body


def test_a_browser_gets_a_page_that_says_how_far_the_start_is(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At `/`, for HTML alone, with the status and the header that others get, and a policy as strict as the page's."""
    with Opening([listener], expected_s=28.4):
        head, body = page(listener, f"GET /?a=b HTTP/1.1\nHost: a\n{BROWSER}")
        assert head.startswith("HTTP/1.1 503 ") and "\r\nRetry-After: 2" in head and "\r\nVary: Accept" in head
        assert f"\r\nContent-Length: {len(body.encode())}\r\n" in head and "text/html; charset=utf-8" in head
        policy = head.partition("Content-Security-Policy: ")[2].partition("\r\n")[0]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert "The service is starting.<" in body and "MESSAGE" not in body
        monkeypatch.setattr(opening_module, "underway", lambda: Underway(1_500_000_000, 3_000_000_000, None))
        assert "It downloads its models: 1.5 GB of 3.0 GB." in page(listener, f"GET / HTTP/1.1\n{BROWSER}")[1]
        for head in (
            f"GET /status HTTP/1.1\n{BROWSER}",
            "GET / HTTP/1.1\nAccept: */*",
            "GET /readyz HTTP/1.1\nX: text/html",
        ):
            assert json.loads(page(listener, head)[1])["status"] == "starting"
    with Opening([listener], expected_s=None, page=False):
        assert json.loads(page(listener, f"GET / HTTP/1.1\n{BROWSER}")[1])["status"] == "starting"
