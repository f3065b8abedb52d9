"""What the front end costs: CPU of the service's process a token, and the jitter it adds to an engine on time.

    .venv/serve-cpu/bin/python tests/bench/front_end.py [--sockets 100,500,1000] [--rate 20] [--seconds 8] [--json FILE]

The engine is scripted (`paced.py`), everything else is real: sockets, uvicorn, Starlette, turns, outboxes. The server
has one core for itself and the client another. `service` is measured over `/ws`, and `completions`, the same service,
over `/v1/chat/completions`, a stream a connection. `websocket` and `http` send the same frames and chunks over the same
uvicorn with nothing in between, the floor for any service on it; `engine` is the paced engine read by bare tasks, which
is no part of a front end and is to be subtracted. Two patterns: `steps`, where all streams get their token in one
engine step, and `spread`, where they get it at even distances.

Jitter is |gap between two tokens at the client - gap between when they were due|, delay is arrival - due.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvloop
from paced import PacedEngine, due_times

from yaptext.bench.conversation import Conversation, Target
from yaptext.bench.openai import OpenAI
from yaptext.bench.plan import Sampling
from yaptext.bench.prompts import Story
from yaptext.bench.service import Service
from yaptext.bench.text import number, table
from yaptext.bench.turn import Turn

KEY = "yap_token"
SERVER_CORE, CLIENT_CORE = 0, 1
SLOTS = {"steps": 1, "spread": 50}
CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","created":1700000000,"model":"chat",'
    b'"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":%b},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
"""The event of a token, as the service sends it."""
SETTLE_S = 1.5
OPEN_AT_ONCE = 50


# --- the server's process


def serve(kind: str, rate: float, slots: int) -> None:
    """Runs until it is killed; its first line on stdout is where it listens."""
    os.sched_setaffinity(0, {SERVER_CORE})
    engine = PacedEngine(rate, slots)
    if kind == "engine":
        uvloop.run(_read_alone(engine))
        return
    from yaptext.engine.base import Engines
    from yaptext.observe import logs
    from yaptext.server.app import create_app
    from yaptext.server.lifecycle import Lifecycle
    from yaptext.server.process import Server
    from yaptext.settings import Settings

    logs.configure(level="warning", format="json", journald=False)
    settings = Settings.load(
        DEPLOY_MODELS="chat", PORT=0, MAX_CONCURRENT_CONNECTIONS=2_000, MAX_SESSIONS=100_000, KV_OVERCOMMIT=0
    )
    lifecycle = Lifecycle()
    if kind in ("service", "completions"):
        app: Any = create_app(settings, open_engines=lambda _: Engines(chat=engine, tool=None), lifecycle=lifecycle)
    else:
        app = _bare(engine, settings)

    class Told(Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            print(self.bound_port, flush=True)

    Told(app, settings, lifecycle).run()


def _bare(engine: PacedEngine, settings: Any) -> Any:
    """The least that can be done for a token on Starlette and uvicorn: encode a frame or a chunk, send it."""
    import msgspec
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    from yaptext.engine.base import Sampling as EngineSampling
    from yaptext.server.pending import PendingConnections
    from yaptext.wire.frames import Models, Token, encode

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        try:
            while (message := msgspec.json.decode(await socket.receive_bytes()))["type"] != "start":
                await socket.send_text('{"type": "pong"}')
            await socket.send_text('{"type": "ack", "for": "start", "turn": 1}')
            sampling = EngineSampling(max_tokens=message["sampling"]["max_tokens"])
            async for delta in engine.stream([], sampling):
                await socket.send_text(encode(Token(text=delta.text, turn=1)).decode())
        except (WebSocketDisconnect, RuntimeError):
            pass

    async def complete(request: Request) -> StreamingResponse:
        sampling = EngineSampling(max_tokens=msgspec.json.decode(await request.body())["max_tokens"])

        async def chunks() -> AsyncIterator[bytes]:
            async for delta in engine.stream([], sampling):
                yield CHUNK % msgspec.json.encode(delta.text)

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        yield {  # what the service's own protocols ask for, and its line at the start
            "service": SimpleNamespace(
                settings=settings,
                pending=PendingConnections(100_000, 3600),
                runtime=SimpleNamespace(models=Models(None, None), engines=SimpleNamespace(distinct={})),
                admission=SimpleNamespace(fitting=0),
            )
        }

    routes = [WebSocketRoute("/ws", talk), Route("/v1/chat/completions", complete, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan)


async def _read_alone(engine: PacedEngine) -> None:
    """Reads as many streams as a line of stdin says, for as many seconds; answers with figures."""
    from yaptext.engine.base import Sampling as EngineSampling

    print(0, flush=True)
    streams, seconds = json.loads(await asyncio.to_thread(sys.stdin.readline))
    arrivals: list[list[tuple[str, float]]] = [[] for _ in range(streams)]

    async def read(found: list[tuple[str, float]]) -> None:
        async for delta in engine.stream([], EngineSampling(max_tokens=10**6)):
            found.append((delta.text, time.monotonic()))

    tasks = [asyncio.create_task(read(found)) for found in arrivals]
    await asyncio.sleep(SETTLE_S)
    begun, cpu = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    ended, cpu = time.monotonic(), time.process_time() - cpu
    for task in tasks:
        task.cancel()
    print(json.dumps(_figures(arrivals, begun, ended, cpu)), flush=True)


# --- the client's


class ServerProcess:
    def __init__(self, kind: str, rate: float, slots: int) -> None:
        command = [sys.executable, __file__, "--serve", kind, "--rate", str(rate), "--slots", str(slots)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{port}" if kind in ("completions", "http") else f"ws://127.0.0.1:{port}/ws"

    def ask(self, question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all its threads, to the nanosecond: the clock that clock_getcpuclockid(3) names."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


async def measure(server: ServerProcess, sockets: int, rate: float, seconds: float) -> dict[str, Any]:
    """All sockets speak for the whole time; only what lies well inside of it is counted."""
    tokens = round(rate * (seconds + 2 * SETTLE_S + sockets * 0.01 + 40))
    sampling = Sampling(min(4096, tokens))
    target: Target = Service(server.url, KEY, sampling)
    if server.url.startswith("http"):
        target = OpenAI(server.url, "chat", KEY, sampling, in_roles=True)
    async with _talking(target, sockets) as turns:
        await asyncio.sleep(SETTLE_S)
        gc.collect()
        gc.disable()
        begun, cpu, own = time.monotonic(), server.cpu_s, time.process_time()
        await asyncio.sleep(seconds)
        ended, cpu, own = time.monotonic(), server.cpu_s - cpu, time.process_time() - own
        gc.enable()
        arrivals = [list(zip(turn.text, turn.arrivals, strict=True)) for turn in turns]
    return _figures(arrivals, begun, ended, cpu) | {"client_core": own / (ended - begun)}


@asynccontextmanager
async def _talking(target: Target, sockets: int) -> AsyncIterator[list[Turn]]:
    conversations: list[Conversation] = []
    turns: list[Turn] = []

    async def begin(user: int) -> None:
        conversation = target.conversation()
        await conversation.open()
        conversations.append(conversation)
        conversation.meet(f"user-{user}", Story("You are kind.", "User: hi\nAssistant: hello"))
        turn = await conversation.begin("Tell me a story.")
        assert await turn.reaches(1), turn.error  # what a request costs is not to be counted
        turns.append(turn)

    for first in range(0, sockets, OPEN_AT_ONCE):
        await asyncio.gather(*(begin(user) for user in range(first, min(sockets, first + OPEN_AT_ONCE))))
    try:
        yield turns
        assert all(turn.outcome == "open" for turn in turns), {turn.error or turn.outcome for turn in turns}
    finally:
        for conversation in conversations:
            conversation.drop()
        await asyncio.sleep(0.1)


def _figures(streams: list[list[tuple[str, float]]], begun: float, ended: float, cpu_s: float) -> dict[str, Any]:
    """Of the frames that arrived between the two times."""
    jitter, delay = [], []
    tokens = frames = 0
    for frames_of_stream in streams:
        seen = []
        for text, arrival in frames_of_stream:
            if begun <= arrival < ended:
                due = due_times(text, arrival)
                frames += 1
                tokens += len(due)
                seen += [(arrival, each) for each in due]
        delay += [(arrival - due) * 1000 for arrival, due in seen]
        jitter += [abs((b - a) - (due_b - due_a)) * 1000 for (a, due_a), (b, due_b) in itertools.pairwise(seen)]
    return {
        "tokens_per_s": tokens / (ended - begun),
        "us_per_token": cpu_s / tokens * 1e6,
        "server_core": cpu_s / (ended - begun),
        "tokens_per_frame": tokens / frames,
        "jitter_p50_ms": np.quantile(jitter, 0.50),
        "jitter_p99_ms": np.quantile(jitter, 0.99),
        "delay_p50_ms": np.quantile(delay, 0.50),
        "delay_p99_ms": np.quantile(delay, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sockets", default="100,500,1000")
    parser.add_argument("--rate", type=float, default=20.0, help="tokens a second of each stream")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--patterns", default="steps,spread")
    parser.add_argument("--servers", default="engine,websocket,service,http,completions")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--slots", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if given.serve:
        serve(given.serve, given.rate, given.slots)
        return

    os.sched_setaffinity(0, {CLIENT_CORE})
    head = ("tokens/s", "us/token", "core", "tokens/frame", "jitter p50", "p99", "delay p50", "p99", "client core")
    rows = [("pattern, sockets, server", *head)]
    results = []
    for pattern, sockets, kind in itertools.product(
        given.patterns.split(","), map(int, given.sockets.split(",")), given.servers.split(",")
    ):
        server = ServerProcess(kind, given.rate, SLOTS[pattern])
        print(f"{pattern}, {sockets} sockets, {kind} (pid {server.process.pid})", file=sys.stderr, flush=True)
        try:
            if kind == "engine":
                found = server.ask([sockets, given.seconds])
            else:
                found = uvloop.run(measure(server, sockets, given.rate, given.seconds))
        finally:
            server.stop()
        results.append({"pattern": pattern, "sockets": sockets, "server": kind} | found)
        rows.append(
            (
                f"{pattern}, {sockets}, {kind}",
                number(found["tokens_per_s"]),
                number(found["us_per_token"]),
                f"{found['server_core']:.0%}",
                f"{found['tokens_per_frame']:.2f}",
                *(number(found[name]) for name in ("jitter_p50_ms", "jitter_p99_ms", "delay_p50_ms", "delay_p99_ms")),
                f"{found['client_core']:.0%}" if "client_core" in found else "",
            )
        )
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps({"rate": given.rate, "seconds": given.seconds, "results": results}, indent=1))


if __name__ == "__main__":
    main()
