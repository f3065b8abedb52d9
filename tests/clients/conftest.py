"""The services that clients talk to, and a client's own process."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from clients.transcript import Pages
from conftest import Running, service
from fakes import Script, ScriptedEngine
from faults.process import Process, serving

from yaptext.engine.base import Engines

KEY = "a-key-for-clients"
ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv" / "clients"
LOAD = ROOT / ".venv" / "load"
TRANSCRIPTS = os.environ.pop("YAP_TEXT_TRANSCRIPTS", "")  # the service takes it for a misspelt setting
CALL = '[{"name":"get_weather","arguments":{"place":"Oslo"}}]'


async def step() -> None:
    """The pace of a scripted token: a client's process has time to close a stream."""
    await asyncio.sleep(0.01)


@dataclass
class Target:
    """A service, by what its users know of it. `engine` and `inside` are the scripted engine and its service,
    `process` is real vLLM, whose conversations are written to `pages`."""

    http: str
    engine: ScriptedEngine | None = None
    process: Process | None = None
    inside: Running | None = None
    pages: Pages | None = None

    def environment(self, home: Path, key: str = KEY, venv: Path = VENV) -> dict[str, str]:
        """What a client finds: an address, a key, and nothing of this machine's own."""
        return {
            "PATH": f"{venv / 'bin'}:/usr/bin:/bin",
            "HOME": str(home),
            "OPENAI_BASE_URL": f"{self.http}/v1",
            "OPENAI_API_KEY": key,
            "NO_PROXY": "127.0.0.1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks another host for prices when it is imported
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    async def running(self) -> int:
        """Requests that the engines work at."""
        async with httpx.AsyncClient(headers={"X-API-Key": KEY}, trust_env=False) as client:
            status = (await client.get(f"{self.http}/status")).json()
        return sum(engine["running"] for engine in status["engines"].values())

    def finished(self) -> list[dict[str, Any]]:
        """What real vLLM's service logged of its turns."""
        return self.process.events("turn.finished") if self.process else []

    def refused(self) -> float:
        """Requests so far that found no slot."""
        assert self.inside is not None
        metrics = self.inside.server.lifespan.state["service"].runtime.metrics
        return metrics.registry.get_sample_value("yaptext_errors_total", {"code": "server_at_capacity"}) or 0.0


@asynccontextmanager
async def scripted(**variables: Any) -> AsyncIterator[Target]:
    """The service in this process, on an engine that says "Hello there." and calls the tool if it may."""
    engine = ScriptedEngine()
    async with service(Engines(chat=engine, tool=engine), YAP_TEXT_API_KEY=KEY, **variables) as running:
        engine.chat = Script(pace=step)  # after the warm-up
        engine.decision = Script(("[]",), calls=(CALL,))
        yield Target(running.http, engine, inside=running)


@pytest.fixture(scope="session")
def demo(state_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """`yap-text serve` with the demo model, started once."""
    folder = tmp_path_factory.mktemp("demo")
    variables = {"YAP_TEXT_STATE_DIR": str(state_folder), "YAP_TEXT_DEVICE": "cpu", "CHAT_TEMPERATURE": "0"}
    with serving(folder / "output", ("-m", "yaptext", "serve"), KEY, **variables) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return Pages(Path(TRANSCRIPTS).resolve() if TRANSCRIPTS else tmp_path_factory.mktemp("transcripts"))


@pytest_asyncio.fixture(params=["scripted", pytest.param("vllm", marks=[pytest.mark.engine, pytest.mark.timeout(600)])])
async def target(request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    if request.param == "vllm":
        process: Process = request.getfixturevalue("demo")
        yield Target(process.http, process=process, pages=request.getfixturevalue("pages"))
        return
    async with scripted() as found:
        yield found


class Client:
    """A process of a client, and what it has told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.transcript = ""
        self.told: list[dict[str, Any]] = []

    async def until(self, what: str) -> dict[str, Any]:
        """The next line of this kind. Lines that are no JSON are the client's own chatter."""
        assert self._process.stdout is not None
        async with asyncio.timeout(120):
            while line := (await self._process.stdout.readline()).decode():
                self.transcript += line
                if line.startswith('{"what"'):
                    self.told.append(json.loads(line))
                    if self.told[-1]["what"] == what:
                        return self.told[-1]
        raise AssertionError(f"the client ended before it told {what!r}")

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    async def end(self) -> list[dict[str, Any]]:
        """All that it told."""
        await self.until("end")
        return self.told

    def add(self, text: str) -> None:
        """What the test saw, for the transcript."""
        self.told.append({"what": "seen", "text": text})

    def of(self, what: str) -> list[dict[str, Any]]:
        return [line for line in self.told if line["what"] == what]


@asynccontextmanager
async def client(name: str, scenario: str, target: Target, folder: Path, *, key: str = KEY) -> AsyncIterator[Client]:
    """Runs a scenario of `scripts/with_NAME.py`. Its transcript is left in `folder`, and shown if the test fails."""
    script = Path(__file__).parent / "scripts" / f"with_{name}.py"
    process = await asyncio.create_subprocess_exec(
        str(VENV / "bin" / "python"),
        str(script),
        scenario,
        env=target.environment(folder, key),
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**20,
    )
    found = Client(process)
    try:
        yield found
    finally:
        if process.returncode is None:
            process.kill()
        rest, _ = await process.communicate()
        found.transcript += rest.decode(errors="replace")
        (folder / f"{name}-{scenario}.jsonl").write_text(found.transcript, encoding="utf-8")
        if target.pages is not None:
            target.pages.add(name, scenario, found.told)
        print(f"--- {name}, {scenario}\n{found.transcript}")


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    if not all((venv / "lock.txt").exists() for venv in (VENV, LOAD)):
        if os.environ.get("CI"):
            pytest.fail("make venv-clients installs what this runs")
        pytest.skip("make venv-clients installs what this runs")
