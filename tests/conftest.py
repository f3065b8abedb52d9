"""What tests share: a conversation in memory, and the service on a loopback port."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import websockets
from documented import Documented, fault_of
from fakes import ScriptedEngine

from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.tools import ToolSet
from yaptext.engine.base import Engines
from yaptext.observe import systemd
from yaptext.server.access.accounts import Account
from yaptext.server.access.keyfile import NO_LIMITS, Key, Limits
from yaptext.server.app import create_app
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.process import Server
from yaptext.server.send_queue import WRITE_NOW
from yaptext.server.ws.connection import Connection
from yaptext.settings import Settings

Frame = dict[str, Any]


async def until(true: Callable[[], bool]) -> None:
    """For what has no event of its own."""
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class MemorySocket:
    """A client and its socket in one: `say` and `leave` are the client's, the rest is what Connection calls."""

    writes_now = True
    """Whether it has the extension of the service's own protocol; any other server's sockets do not."""

    def __init__(self) -> None:
        self.scope = {"extensions": {WRITE_NOW: self.write_now} if self.writes_now else {}}
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._news = asyncio.Condition()
        self.reading = asyncio.Event()
        self.reading.set()
        self.frames: list[Frame] = []
        self.closed: int | None = None

    def say(self, type: str, **fields: Any) -> None:
        self.say_raw(json.dumps({"type": type, **fields}))

    def say_raw(self, frame: str) -> None:
        self._inbox.put_nowait({"type": "websocket.receive", "text": frame})

    def start(self, utterance: str = "hi", session_id: str = "s", **fields: Any) -> None:
        self.say("start", session_id=session_id, user_utterance=utterance, **fields)

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": 1006})

    async def until(self, found: Callable[[Frame], bool] | str, count: int = 1) -> Frame:
        """The `count`-th frame that matches, a type name or a test, as soon as it is there."""

        def matches(frame: Frame) -> bool:
            return frame["type"] == found if isinstance(found, str) else found(frame)

        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: sum(map(matches, self.frames)) >= count)
        return [frame for frame in self.frames if matches(frame)][count - 1]

    def of(self, type: str, turn: int | None = None) -> list[Frame]:
        return [f for f in self.frames if f["type"] == type and turn in (None, f.get("turn"))]

    async def receive(self) -> dict[str, Any]:
        return await self._inbox.get()

    def write_now(self, frame: bytes) -> bool:
        if not self.reading.is_set():
            return False
        self.frames.append(json.loads(frame))
        self._telling = asyncio.ensure_future(self._tell())
        return True

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def send_text(self, text: str) -> None:
        await self.reading.wait()
        async with self._news:
            self.frames.append(json.loads(text))
            self._news.notify_all()

    async def send(self, event: dict[str, Any]) -> None:
        self.frames.append(json.loads(event["text"]))

    async def close(self, code: int, reason: str = "") -> None:
        self.closed = code


class Talk:
    """A runtime with scripted engines, and sockets that talk on it."""

    def __init__(self, runtime: Runtime, group: asyncio.TaskGroup) -> None:
        self.runtime, self._group = runtime, group
        self.open: list[tuple[MemorySocket, asyncio.Task[Any]]] = []

    def socket(self, key_name: str = "default", limits: Limits = NO_LIMITS) -> MemorySocket:
        socket = MemorySocket()
        account = Account(Key(key_name, b"", limits))
        connection = Connection(socket, self.runtime, account)  # type: ignore[arg-type]
        self.open.append((socket, self._group.create_task(connection.serve())))
        return socket

    async def over(self, socket: MemorySocket) -> None:
        """Waits until the connection of `socket` has ended."""
        async with asyncio.timeout(60):
            await next(task for other, task in self.open if other is socket)


@asynccontextmanager
async def talking(
    chat: ScriptedEngine | None = None, tool: ScriptedEngine | None = None, **variables: Any
) -> AsyncIterator[Talk]:
    """Both roles on one scripted engine unless told otherwise; `variables` are settings by name."""
    chat = chat or ScriptedEngine()
    settings = Settings.load(**variables)
    deployed = Engines(
        chat=chat if settings.chat_deployed else None,
        tool=(tool or chat) if settings.tool_deployed else None,
    )
    runtime = await Runtime.open(settings, deployed, ToolSet.from_file(settings.tools_file))
    async with asyncio.TaskGroup() as group:
        talk = Talk(runtime, group)
        yield talk
        for socket, _ in talk.open:
            socket.reading.set()
            socket.leave()
    assert [fault for socket, _ in talk.open for fault in map(fault_of, socket.frames) if fault is not None] == []


def check_frames(frames: list[Frame], *, decides: bool = True) -> None:
    """Holds the frames of one socket against the rules of a turn, whatever was sent to it."""
    seen: dict[int, list[str]] = defaultdict(list)
    text: dict[int, str] = defaultdict(str)
    for frame in frames:
        turn = frame.get("turn")
        if not turn or (frame["type"] == "ack" and frame["for"] == "set_persona"):
            continue
        kinds = seen[turn]
        kind = frame["type"]
        assert "done" not in kinds and "error" not in kinds, f"{kind} after the end of turn {turn}"
        match kind:
            case "ack":
                assert not kinds
            case "toolcall":
                assert kinds == ["ack"]
            case "token":
                assert "toolcall" in kinds or not decides, "a token before its decision"
                text[turn] += frame["text"]
            case "final":
                assert frame["normalized_text"] == text[turn]
            case "done":
                assert kinds[0] == "ack"
                assert frame.get("cancelled") or "final" in kinds
        kinds.append(kind)
    running: set[int] = set()
    for frame in frames:
        if frame["type"] == "ack" and frame["for"] != "set_persona":
            assert not running, f"ack of turn {frame['turn']} while {running} had no done"
            running.add(frame["turn"])
        elif frame["type"] in ("done", "error"):
            running.discard(frame.get("turn", 0))


class Running:
    """A service that listens on loopback."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = f"http://127.0.0.1:{server.bound_port}"
        self.ws = f"ws://127.0.0.1:{server.bound_port}/ws"

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self.server.lifespan.state["service"].admission.slots)

    def connect(self, key: str = "yap_token", **options: Any) -> Any:
        return websockets.connect(self.ws, additional_headers={"X-API-Key": key}, proxy=None, **options)


@asynccontextmanager
async def service(engines: Engines, **variables: Any) -> AsyncIterator[Running]:
    """The whole service in this process, over the given engines; on a free port unless `PORT` is given. What it sends
    has to be what it publishes."""
    variables.setdefault("YAP_TEXT_STATE_DIR", "/nonexistent")  # tests must not touch the user's own state
    settings = Settings.load(**{"PORT": 0} | variables)
    lifecycle = Lifecycle()
    app = Documented(create_app(settings, open_engines=lambda _: engines, lifecycle=lifecycle))
    server = Server(app, settings, lifecycle)
    task = asyncio.create_task(server._serve())
    try:
        while not server.started:
            assert not task.done(), task.result()
            await asyncio.sleep(0.01)
        yield Running(server)
    finally:
        lifecycle.exit_requested.set()
        await task
    assert app.faults == []


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Settings come from the test, not from the machine that it runs on."""
    from yaptext.settings.table import variables

    for variable in variables():
        monkeypatch.delenv(variable.name, raising=False)
    for old in ("HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_ENABLE_HF_TRANSFER"):
        monkeypatch.delenv(old, raising=False)


@pytest.fixture(scope="session")
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo model is converted, once a test run; `YAP_TEXT_TEST_STATE` keeps it between runs."""
    kept = os.environ.get("YAP_TEXT_TEST_STATE")
    return Path(kept) if kept else tmp_path_factory.mktemp("state")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_engine(state_folder: Path) -> AsyncIterator[Any]:
    """The embedded model on real vLLM, opened once a test run (in the loop of the session)."""
    from yaptext.engine.registry import open_engines

    with pytest.MonkeyPatch.context() as environment:
        for name, value in os.environ.items():
            environment.setenv(name, value)  # so that what vLLM is told does not outlive it
        engines = open_engines(
            Settings.load(YAP_TEXT_STATE_DIR=state_folder, YAP_TEXT_DEVICE="cpu", QUANTIZATION="none")
        )
        assert engines.chat is engines.tool, "one checkpoint, one engine"
        yield engines.chat
        assert engines.chat is not None
        await engines.chat.aclose()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[socket.socket]:
    """systemd's side of the notify socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(60)
        systemd.connect(str(tmp_path / "notify"))
        yield receiver
        systemd.connect(None)


def fill(folder: Path) -> Path:
    """Fills the disk that a folder is on, of a few MB; returns the file that does."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1000))
    return ballast
