"""A reload that is refused is told until one succeeds: by /status, /metrics and the supervisor's status."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Running, service
from fakes import ScriptedEngine

from yaptext.dialogue import persona
from yaptext.engine.base import Engines
from yaptext.server.access import keyfile
from yaptext.server.lifecycle import Lifecycle


@pytest.fixture(autouse=True)
def _own_personas() -> Iterator[None]:
    yield
    persona.use_folder(None)


def scripted() -> Engines:
    engine = ScriptedEngine()
    return Engines(chat=engine, tool=engine)


async def heard(supervisor: socket.socket, assignment: str) -> dict[str, str]:
    """The next message that has the assignment."""
    while True:
        lines = (await asyncio.to_thread(supervisor.recv, 4096)).decode().splitlines()
        if assignment in lines:
            return dict(line.split("=", 1) for line in lines)


async def asked(running: Running) -> tuple[Any, str]:
    """`reload` of /status, and the gauge."""
    async with httpx.AsyncClient(base_url=running.http, trust_env=False, headers={"X-API-Key": "own"}) as client:
        lines = (await client.get("/metrics")).text.splitlines()
        (gauge,) = [line for line in lines if line.startswith("yaptext_reload_failed ")]
        return (await client.get("/status")).json()["reload"], gauge.split()[1]


@pytest.mark.parametrize("what", ["keys", "personas"])
async def test_a_refused_reload_is_told_until_one_succeeds(
    tmp_path: Path, supervisor: socket.socket, what: str
) -> None:
    """The next restart would end at that file. A reload begins with RELOADING and ends with READY."""
    keys, folder = tmp_path / "keys", tmp_path / "personas"
    keyfile.add("a", keys)
    folder.mkdir()
    good = 'title = "Ghost"\ntext = "You are a ghost."'
    (folder / "ghost.toml").write_text(good)
    settings = {"YAP_TEXT_API_KEY": "own", "YAP_TEXT_KEY_FILE": keys, "PERSONAS_DIR": folder}
    async with service(scripted(), **settings) as running:
        serving = f"Serving on 127.0.0.1:{running.server.bound_port}."
        assert (await heard(supervisor, "READY=1"))["STATUS"] == serving
        assert await asked(running) == (None, "0.0")

        file = keys if what == "keys" else folder / "ghost.toml"
        before = file.read_text()
        file.write_text("broken\n")
        os.kill(os.getpid(), signal.SIGHUP)
        assert int((await heard(supervisor, "RELOADING=1"))["MONOTONIC_USEC"]) > 0
        status = (await heard(supervisor, "READY=1"))["STATUS"]
        assert status.startswith(f"{serving} The last reload was refused: ") and str(file.name) in status
        reload, gauge = await asked(running)
        assert (reload["ok"], gauge) == (False, "1.0")
        assert str(file.name) in reload["error"] and reload["at"].endswith("+00:00")

        file.write_text(before)
        os.kill(os.getpid(), signal.SIGHUP)
        await heard(supervisor, "RELOADING=1")
        assert (await heard(supervisor, "READY=1"))["STATUS"] == serving
        reload, gauge = await asked(running)
        assert (reload["ok"], reload["error"], gauge) == (True, None, "0.0")


async def test_a_name_of_any_bytes_adds_no_assignment(supervisor: socket.socket) -> None:
    """A file may be called anything; the status stays one line of a size that systemd takes."""
    lifecycle = Lifecycle()
    lifecycle.phase, lifecycle.address = "ready", "127.0.0.1:1"
    with lifecycle.reloading() as refused:
        refused.append("a\nWATCHDOG=1 \udcff" + "é" * 5000)
    told = await heard(supervisor, "READY=1")
    assert list(told) == ["READY", "STATUS"]
    assert "a WATCHDOG=1 \\udcff" in told["STATUS"] and len(told["STATUS"].encode()) <= 1000


async def test_a_reload_that_crashes_is_refused_and_the_next_is_done(supervisor: socket.socket) -> None:
    """A fault in one does not end all that come after it."""
    lifecycle = Lifecycle()
    lifecycle.phase = "ready"
    with lifecycle.reloading():
        raise RuntimeError
    assert lifecycle.reload is not None and not lifecycle.reload.ok
    with lifecycle.reloading():
        pass
    assert lifecycle.reload.ok
