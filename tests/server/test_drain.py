"""How the service ends: what a drain tells whom, and when; and what a second signal does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import journal
import pytest
import websockets
from conftest import service
from conftest import until as passed
from fakes import Gate, Script, ScriptedEngine

from yaptext.engine.base import Engines

START = json.dumps({"type": "start", "session_id": "s", "user_utterance": "hi"})


async def until(socket: Any, type: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while (frame := json.loads(await socket.recv()))["type"] != type:
            pass
    return dict(frame)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via"])
async def test_a_proxy_is_refused_before_the_upgrade(header: str) -> None:
    """503 and Retry-After: it can ask another server. Who connects directly gets the frame (rule 10)."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        gate = Gate()
        engine.chat = Script(["a"], pace=gate)
        async with running.connect() as talking:
            await talking.send(START)
            await until(talking, "toolcall")
            running.server.begin_drain()
            await asyncio.sleep(0)
            proxied = {"X-API-Key": "yap_token", header: "192.0.2.1"}
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(running.ws, additional_headers=proxied, proxy=None)
            response = refused.value.response
            assert response.status_code == 503 and 1 <= int(response.headers["Retry-After"]) <= 10
            assert json.loads(response.body)["error_code"] == "going_away"
            gate.step()
            assert (await until(talking, "done"))["finish_reason"] == "stop"


async def test_sockets_are_closed_one_by_one() -> None:
    """Spread over at most a second, each with its own time to come back."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine), MAX_CONCURRENT_CONNECTIONS=40) as running:
        sockets = [await running.connect() for _ in range(40)]
        left = [running.active]
        running.server.begin_drain()
        waits = []
        for closing in asyncio.as_completed([until(socket, "error") for socket in sockets]):
            waits.append((await closing)["retry_after_ms"])
            left.append(running.active)
        start_ms = round(running.server.lifecycle.start_s * 1000)
        assert len(set(waits)) > 20 and min(waits) >= start_ms + 1000 and max(waits) <= start_ms + 4000
        assert len([count for count in set(left) if 0 < count < 40]) > 5, "they were not closed at once"
        await running.server.drained
        assert running.active == 0


async def test_a_socket_is_closed_after_its_turn() -> None:
    """Not when all turns are over: with many users there is hardly such a moment. Who has not had a turn may still
    begin one."""
    engine, slow, quick = ScriptedEngine(), Gate(), Gate()
    async with service(Engines(engine, engine)) as running:
        async with running.connect() as first, running.connect() as second, running.connect() as third:
            for socket, pace, name in ((first, slow, "a"), (second, quick, "b")):
                engine.chat = Script(["x"], pace=pace)
                await socket.send(START.replace('"s"', f'"{name}"'))
                await until(socket, "toolcall")
            running.server.begin_drain()
            await asyncio.sleep(0)  # the drain's first step: it sees both at work
            quick.step()
            assert (await until(second, "done"))["finish_reason"] == "stop"
            assert (await until(second, "error"))["error_code"] == "going_away"
            engine.chat = Script(["late"])
            await third.send(START.replace('"s"', '"c"'))
            assert (await until(third, "final"))["normalized_text"] == "late"
            slow.step()
            assert (await until(first, "done"))["finish_reason"] == "stop"
            for socket in (first, third):
                assert (await until(socket, "error"))["error_code"] == "going_away"


async def test_a_turn_that_takes_too_long_is_cut_and_told() -> None:
    """After DRAIN_TIMEOUT_S: its done, cancelled, then going_away."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine), DRAIN_TIMEOUT_S=0.05) as running, running.connect() as socket:
        engine.chat = Script(["a"], pace=Gate())
        await socket.send(START)
        await until(socket, "toolcall")
        running.server.begin_drain()
        assert (await until(socket, "done"))["cancelled"] is True
        assert (await until(socket, "error"))["error_code"] == "going_away"
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 1012


# --- signals

PROGRAM = """
import asyncio, multiprocessing, time
from fakes import Script, ScriptedEngine
from yaptext.commands import startup_logs
from yaptext.engine.base import Engines
from yaptext.server.app import create_app
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.process import Server
from yaptext.settings import Settings

class Slow(ScriptedEngine):
    async def aclose(self, *, at_once=False):
        print("closing", self.model, flush=True)
        await asyncio.to_thread(time.sleep, 60)

def main():
    settings = Settings.load()
    startup_logs.start(settings)
    lifecycle = Lifecycle()
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    child.start()
    print("child", child.pid, flush=True)
    chat, tool = Slow(model="chat"), Slow(model="tool")
    async def pace():
        if len(chat.requests) > 1:  # one is of the start
            await asyncio.sleep(300)
    chat.chat = Script(["a"], pace=pace)
    app = create_app(settings, open_engines=lambda _: Engines(chat, tool), lifecycle=lifecycle)
    Server(app, settings, lifecycle).run()

if __name__ == "__main__":
    main()
"""


class Served:
    """The service in its own process, and what it printed. No reply ends by itself, and closing takes a minute."""

    def __init__(self, folder: Path) -> None:
        (folder / "program.py").write_text(PROGRAM)
        self.printed = folder / "printed"
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        environment = os.environ | {"PORT": "0", "LOG_FORMAT": "json", "PYTHONPATH": paths}
        with self.printed.open("wb") as output:
            command = [sys.executable, str(folder / "program.py")]
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def until(self, text: str, count: int = 1) -> str:
        """The `count`-th line that holds the text."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            lines = [line for line in journal.lines(self.printed) if text in line]
            if len(lines) >= count:
                return lines[count - 1]
            assert self.process.poll() is None, self.printed.read_text()
            time.sleep(0.02)
        raise AssertionError(self.printed.read_text())

    @property
    def url(self) -> str:
        return str(json.loads(self.until("server.ready"))["url"]).replace("http", "ws") + "/ws"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()


def gone(pid: int) -> bool:
    """True where the process has ended, also where nobody has taken note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.subprocess
async def test_a_second_signal_cuts_the_drain(served: Served) -> None:
    """The first waits for the running turn, the second ends the process and its engines' with the signal's status."""
    child = int((await asyncio.to_thread(served.until, "child ")).split()[1])
    key = {"X-API-Key": "yap_token"}
    async with websockets.connect(served.url, additional_headers=key, proxy=None) as socket:
        await socket.send(START)
        await until(socket, "toolcall")
        served.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(served.until, "drain.begun")
        assert served.process.poll() is None
        served.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(served.process.wait, 30) == 128 + signal.SIGTERM
        await passed(lambda: gone(child))  # it notices the death of its parent


@pytest.mark.subprocess
def test_a_second_signal_waits_for_no_engine(served: Served) -> None:
    """All engines close at once, and the loop goes on meanwhile: it takes the signal."""
    assert served.url
    served.process.send_signal(signal.SIGTERM)
    served.until("closing", count=2)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 128 + signal.SIGINT
    assert "drain.abandoned" in served.printed.read_text()
