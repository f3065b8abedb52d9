"""What one key can cost another: a neighbour's conversations, quiet and beside a key that does its worst.

    YAP_TEXT_STATE_DIR=FOLDER .venv/serve-cpu/bin/python tests/bench/noisy_neighbour.py [--seconds 60] [--only KIND,...]

The engines are scripted and answer at once; tokenizer, chat template, grammar check, sockets and all else are the real
ones. Two keys of a key file with the default limits. The noisy one keeps at its limits, in each way by itself and in
all together: large frames of each kind, new tools, histories, personas, warm-ups, new sessions, reconnects.
Milliseconds at the neighbour's client, and MiB by which the server's memory grew. Then the frame that holds the event
loop longest, as `tests/fuzz/expensive.py` finds it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
import websockets

from yaptext.bench.text import number, table
from yaptext.server.access import keyfile

SERVER_CORE, CLIENT_CORE = 0, 1
NEIGHBOURS, PAUSE_S = 8, 0.9
NOISY_SOCKETS = 8
FRAMES_PER_S = 40.0
"""Of all noisy sockets together: what 6,000 frames a minute are, at once for a minute and no more after it."""


def serve(key_file: str) -> None:
    """Runs until it is killed; its first line on stdout is where it listens."""
    os.sched_setaffinity(0, {SERVER_CORE})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the service
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fakes import TokenizedEngine
    from transformers import AutoTokenizer

    from yaptext.engine import demo
    from yaptext.engine.base import Engines
    from yaptext.engine.codec import HubCodec
    from yaptext.engine.vllm.grammar import GrammarCheck
    from yaptext.observe import logs
    from yaptext.server.app import create_app
    from yaptext.server.lifecycle import Lifecycle
    from yaptext.server.process import Server
    from yaptext.settings import Settings

    logs.configure(level="error", format="json", journald=False)
    settings = Settings.load(YAP_TEXT_KEY_FILE=key_file, PORT=0, MAX_CONCURRENT_CONNECTIONS=100, KV_OVERCOMMIT=0)
    folder = demo.folder(settings.state)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = TokenizedEngine(HubCodec(tokenizer, max_model_len=8192, block_size=16))
    engine.check_schema = GrammarCheck(str(folder), len(tokenizer)).check  # type: ignore[method-assign]
    lifecycle = Lifecycle()
    app = create_app(settings, open_engines=lambda _: Engines(chat=engine, tool=engine), lifecycle=lifecycle)

    class Told(Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            print(self.bound_port, flush=True)

    Told(app, settings, lifecycle).run()


# --- the noisy one's frames, each as large and dear as its limits let it be


def _random_words(dice: random.Random, characters: int) -> str:
    return " ".join(f"{dice.getrandbits(48):x}" for _ in range(characters // 13))


def _start(dice: random.Random, **more: Any) -> str:
    frame = {"type": "start", "session_id": f"s{dice.randrange(10**9)}", "user_utterance": "Hi"} | more
    return json.dumps(frame)


def _tools(dice: random.Random) -> list[dict[str, Any]]:
    properties = {f"p{number}": {"$ref": "#/$defs/a"} for number in range(12)}
    parameters = {"type": "object", "properties": properties, "$defs": {"a": {"type": "string"}}}
    return [
        {"name": f"t{number}_{dice.randrange(10**6)}", "description": "d" * 20, "parameters": parameters}
        for number in range(60)
    ]


KINDS: dict[str, Callable[[random.Random], str]] = {
    "utterances": lambda dice: _start(dice, user_utterance=_random_words(dice, 900_000)),
    "histories": lambda dice: _start(dice, history_text=f"User: {_random_words(dice, 900_000)}"),
    "rare characters": lambda dice: _start(
        dice, history_text="".join(chr(dice.randrange(0x12000, 0x12399)) for _ in range(90_000))
    ),
    "items": lambda dice: _start(dice, history=[{"role": "user", "content": f"{dice.random()}"}] * 17_000),
    "personas": lambda dice: _start(dice, persona_text=_random_words(dice, 5_000)),
    "tools": lambda dice: _start(dice, tools=_tools(dice)),
    "warm-ups": lambda dice: json.dumps(
        {"type": "warm_history", "persona_style": "savage", "history_text": f"User: {_random_words(dice, 60_000)}"}
    ),
    "sessions": lambda dice: json.dumps(
        {"type": "set_persona", "session_id": f"s{dice.randrange(10**9)}", "persona_style": "savage"}
    ),
    "fields": lambda dice: _start(dice, **{f"k{number}": 0 for number in range(60_000)}),
}


async def noise(url: str, key: str, kinds: list[str]) -> None:
    """Frames of these kinds in turn, until it is cancelled; every eighth on a new socket."""
    dice = random.Random(7)
    ready = {kind: [KINDS[kind](dice) for _ in range(12)] for kind in kinds}

    async def one(offset: int) -> None:
        count = offset
        while True:
            with suppress(OSError, websockets.WebSocketException):
                async with websockets.connect(url, additional_headers={"X-API-Key": key}, compression=None) as socket:
                    for _ in range(8):
                        frames = ready[kinds[count % len(kinds)]]
                        frame = frames[dice.randrange(len(frames))]
                        if frame.startswith('{"type": "start", "session_id": "s'):
                            frame = f'{{"type": "start", "session_id": "s{dice.randrange(10**9)}{frame[34:]}'
                        await socket.send(frame)
                        count += 1
                        await asyncio.sleep(NOISY_SOCKETS / FRAMES_PER_S)
            await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        for offset in range(NOISY_SOCKETS):
            group.create_task(one(offset))


# --- the neighbour


async def converse(url: str, key: str, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds from a `start` to its decision, and to its first token."""
    decisions: list[float] = []
    firsts: list[float] = []

    async def one(user: int) -> None:
        async with websockets.connect(url, additional_headers={"X-API-Key": key}, compression=None) as socket:
            until, turn = time.monotonic() + seconds, 0
            await asyncio.sleep(user * PAUSE_S / NEIGHBOURS)
            while time.monotonic() < until:
                turn += 1
                begun = time.perf_counter()
                await socket.send(json.dumps(
                    {"type": "start", "session_id": f"u{user}", "user_utterance": f"What is {turn} and {user}?"}
                ))  # fmt: skip
                waits = True
                while True:
                    kind = json.loads(await socket.recv())["type"]
                    passed = (time.perf_counter() - begun) * 1000
                    if kind == "toolcall":
                        decisions.append(passed)
                    elif kind == "token" and waits:
                        firsts.append(passed)
                        waits = False
                    elif kind == "done":
                        break
                    elif kind == "error":
                        raise RuntimeError("the neighbour's turn failed")
                await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as group:
        for user in range(NEIGHBOURS):
            group.create_task(one(user))
    return decisions, firsts


# --- the measurement


def _rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def _runs(kinds: list[str]) -> Iterator[tuple[str, list[str]]]:
    yield "quiet", []
    for kind in kinds:
        yield kind, [kind]
    if len(kinds) > 1:
        yield "all together", kinds
    yield "quiet again", []


def measure(seconds: float, kinds: list[str]) -> str:
    rows = [("the noisy key sends", "decision p50", "p99", "first token p50", "p99", "MiB more")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "keys")
        keys = []
        for name in ("neighbour", "noisy"):
            key, line = keyfile.add(name, None)
            keys.append(key)
            with file.open("a") as lines:
                lines.write(f"{line}\n")
        file.chmod(0o600)
        command = [sys.executable, __file__, "--serve", str(file)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = f"ws://127.0.0.1:{int(server.stdout.readline())}/ws"
            uvloop.run(converse(url, keys[0], 3))
            for name, run in _runs(kinds):
                before = _rss_mb(server.pid)
                noisy = None
                if run:
                    noisy = subprocess.Popen(
                        [sys.executable, __file__, "--noise", url, ",".join(run)], stdin=subprocess.PIPE
                    )
                    assert noisy.stdin is not None
                    noisy.stdin.write(f"{keys[1]}\n".encode())  # no argument: others read those
                    noisy.stdin.flush()
                    time.sleep(2)
                try:
                    decisions, firsts = uvloop.run(converse(url, keys[0], seconds if len(run) != 1 else seconds / 4))
                finally:
                    if noisy is not None:
                        noisy.kill()
                        noisy.wait()
                figures = [np.quantile(values, at) for values in (decisions, firsts) for at in (0.5, 0.99)]
                rows.append((name, *map(number, figures), f"{_rss_mb(server.pid) - before:.0f}"))
                print(*rows[-1], file=sys.stderr, flush=True)
        finally:
            server.kill()
            server.wait()
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of quiet, and of all kinds together")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of noise")
    parser.add_argument("--examples", type=int, default=600, help="frames of the search for the dearest one, or 0")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--noise", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    elif given.noise:
        os.sched_setaffinity(0, {CLIENT_CORE})
        os.nice(5)  # the neighbour's client is what is measured
        uvloop.run(noise(given.noise[0], sys.stdin.readline().strip(), given.noise[1].split(",")))
    else:
        os.sched_setaffinity(0, {CLIENT_CORE})
        print(measure(given.seconds, given.only.split(",")))
        if given.examples:
            tests = Path(__file__).parents[1]
            search = [sys.executable, tests / "fuzz" / "expensive.py", "--examples", str(given.examples)]
            subprocess.run(search, env=os.environ | {"PYTHONPATH": str(tests)}, check=True)


if __name__ == "__main__":
    main()
