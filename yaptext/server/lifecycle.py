"""From the first byte of a start to the last of a stop: readiness, drain, and the death of an engine."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import structlog
import uvicorn

from yaptext.build import build
from yaptext.engine.base import Engines
from yaptext.errors import EngineDead, GoingAway, StartError, StartRefused, YapError
from yaptext.observe import logs, redact
from yaptext.observe.systemd import notify
from yaptext.server.admission import Admission
from yaptext.server.opening import Opening
from yaptext.server.pulse import Pulse
from yaptext.server.record import Record
from yaptext.server.transport import HttpProtocol, WebSocketProtocol
from yaptext.settings import FIRST_PASSED_FD, Settings

if TYPE_CHECKING:
    from yaptext.server.ws.connection import Connection

_log = structlog.get_logger(__name__)
WATCH_S = 0.5
PROBE_EVERY_S = 15.0
"""Engines are asked for a token at least so often, and twice in the time of the supervisor's watchdog."""
_MOST_STATUS_BYTES = 1000
"""systemd drops a message of over 4096 bytes."""
_SWITCH_S = 0.0005
"""How long a thread may keep the interpreter while the event loop waits for it; Python's default is 5 ms."""
_RETRY_AFTER_MS = (1000, 4000)
"""Clients of a restart come back spread over this window after the time of a start, not all at once."""
_BACKLOG = 1024
_CLOSE_EVERY_S, _CLOSES_WITHIN_S = 0.02, 1.0
"""A drain closes sockets one by one, so that neither this process nor the next, or a proxy, has them all at once."""
_LEAVE_S = 3.0
"""How long clients may take to read their close."""

Phase = Literal["starting", "ready", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class Reload:
    """What became of the latest reload: `error` says what was refused. `at` is in UTC."""

    ok: bool
    error: str | None
    at: str


class Lifecycle:
    """The phase the process is in, and the steps from one to the next."""

    def __init__(self) -> None:
        self.phase: Phase = "starting"
        self.on_loopback = False
        """True if nothing but this machine reaches the service."""
        self.exit_requested = asyncio.Event()
        self.failure: YapError | None = None
        self.pulses: list[Pulse] = []
        self.reload: Reload | None = None
        """None until the first SIGHUP."""
        self.address = ""
        """Where it serves."""
        self.start_s = 0.0
        """How long the start took."""
        self.start_told: list[str] = []
        """What to know of the start, in sentences."""
        self.troubles: list[str] = []
        """What goes wrong although the service serves, in sentences."""

    @property
    def silence(self) -> str | None:
        """Which engines do not answer, in words."""
        silent = [(pulse.role, pulse.silent_since) for pulse in self.pulses if pulse.silent_since is not None]
        told = [f"The {role} engine has not answered since {since:%H:%M:%S} UTC." for role, since in silent]
        return " ".join(told) or None

    def tell(self, *assignments: str) -> None:
        """Tells the supervisor where the service serves, and what is wrong (`STATUS=`)."""
        if self.phase != "ready":
            return
        told = [f"Serving on {self.address}.", self.silence or "", *self.troubles]
        if self.reload is not None and not self.reload.ok:
            told.append(f"The last reload was refused: {self.reload.error}")
        line = " ".join(" ".join(told + self.start_told).split()).encode(errors="replace")[:_MOST_STATUS_BYTES]
        notify(*assignments, f"STATUS={line.decode(errors='ignore')}")

    async def keep_told(self, look: Callable[[], list[str]]) -> None:
        """For ever: tells the supervisor whenever the troubles are others."""
        while True:
            if (found := look()) != self.troubles:
                self.troubles = found
                self.tell()
            await asyncio.sleep(WATCH_S)

    @contextmanager
    def reloading(self) -> Iterator[list[str]]:
        """Around a reload. The block adds why something was refused."""
        refused: list[str] = []
        if self.phase == "ready":
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield refused
        except Exception:
            _log.exception("reload.crashed")
            refused.append("a fault of the service; the log has the traceback (reload.crashed)")
        # File names may hold any bytes.
        error = "; ".join(refused).encode(errors="backslashreplace").decode()
        self.reload = Reload(not refused, error or None, datetime.now(UTC).isoformat(timespec="seconds"))
        self.tell("READY=1")

    @contextmanager
    def starting(self) -> Iterator[None]:
        """With an error of ours that the block raises the start ends, and it says enough."""
        try:
            yield
        except YapError as error:
            self.failure = error
            _silence_uvicorn()
            raise

    def going_away(self) -> GoingAway:
        """With the time after which the next process is likely to be ready: what this one's start took."""
        wait_ms = round(self.start_s * 1000) + random.randint(*_RETRY_AFTER_MS)
        return GoingAway("The server is restarting.", retry_after_ms=wait_ms)

    @asynccontextmanager
    async def watching(
        self,
        engines: Engines,
        admission: Admission,
        watchdog_s: float | None = None,
        *more: Coroutine[None, None, None],
    ) -> AsyncIterator[None]:
        """While the block runs, a dead engine ends every turn and the process, one that does not answer is told, and
        the supervisor's watchdog (`watchdog_s`) is fed as long as every engine answers. `more` runs beside these."""
        every_s = min(PROBE_EVERY_S, watchdog_s / 2) if watchdog_s else PROBE_EVERY_S
        self.pulses = [Pulse(role, engine, self.tell) for role, engine in engines.distinct.items()]
        watches = [self._watch(engines, admission), *more, *self._probes(every_s)]
        tasks = [asyncio.create_task(self._guard(watch)) for watch in watches]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _guard(self, watch: Coroutine[None, None, None]) -> None:
        """A watch that fails by itself ends the process: nobody would see what it was there to see."""
        try:
            await watch
        except Exception:
            _log.exception("watch.crashed")
            self.phase = "dead"
            self.exit_requested.set()

    async def while_ready(self, steps: AsyncGenerator[None, None]) -> None:
        """Takes step after step from READY on, until the last or until a drain begins."""
        while self.phase == "starting":  # noqa: ASYNC110  # uvicorn is about to listen
            await asyncio.sleep(0.02)
        async with aclosing(steps):
            async for _ in steps:
                if self.phase != "ready":
                    return

    def _probes(self, every_s: float) -> Iterator[Coroutine[None, None, None]]:
        """One for each engine. The watchdog is fed whenever all have been heard since the last time."""
        unheard = set(self.pulses)

        def heard(pulse: Pulse) -> None:
            unheard.discard(pulse)
            if not unheard:
                notify("WATCHDOG=1")
                unheard.update(self.pulses)

        for pulse in self.pulses:
            yield pulse.keep(every_s, partial(heard, pulse))

    async def _watch(self, engines: Engines, admission: Admission) -> None:
        while True:
            for role, engine in engines.distinct.items():
                try:
                    await engine.check()
                except EngineDead as error:
                    cause = " ".join(getattr(error, "__notes__", ()))
                    _log.critical("engine.died", engine=role, model=engine.model, error=cause or error.message)
                    self.phase = "dead"
                    notify(f"STATUS=The {role} engine died. {cause}".strip())
                    for connection in list(admission.connections):
                        connection.fail(error)
                        connection.end(self.going_away())
                    await _all_left(admission, 1)
                    self.exit_requested.set()
                    return
            await asyncio.sleep(WATCH_S)

    async def drain(self, admission: Admission, timeout_s: float) -> None:
        """Refuses new sockets, lets running turns finish within the time, then sends everyone away, one by one.

        A socket is closed once it has had its turn: where many talk there is hardly a moment in which nobody does.
        """
        if self.phase == "ready":
            self.phase = "draining"
            notify("STOPPING=1", "STATUS=Finishing the running turns.")
            _log.info("drain.begun", connections=len(admission.connections), timeout_s=timeout_s)
            deadline = time.monotonic() + timeout_s
            talked: set[Connection] = set()
            while (busy := {c for c in admission.connections if c.busy}) and time.monotonic() < deadline:
                for connection in talked - busy:
                    connection.end(self.going_away())
                talked = busy
                await asyncio.sleep(0.02)
            leaving = list(admission.connections)
            random.shuffle(leaving)
            for connection in leaving:
                connection.end(self.going_away())
                await asyncio.sleep(min(_CLOSE_EVERY_S, _CLOSES_WITHIN_S / len(leaving)))
            await _all_left(admission, _LEAVE_S)
            _log.info("drain.finished", turns_cut=len(busy))
        self.exit_requested.set()


async def _all_left(admission: Admission, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while admission.connections and time.monotonic() < deadline:  # noqa: ASYNC110  # of many connections
        await asyncio.sleep(0.02)


def _silence_uvicorn() -> None:
    """For a start that ends for a known reason: uvicorn would log it as a crash, with a traceback."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)


def of_start(record: Record, warnings: list[str]) -> list[str]:
    """For the supervisor's status: what was not usual about a start."""
    told = [] if record.is_usual else [f"Started after {record.after}."]
    if warnings:
        told.append(
            f"{len(warnings)} {'warning' if len(warnings) == 1 else 'warnings'} at the start: {'; '.join(warnings)}"
        )
    return told


def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets for every address of a host. Raises `StartError`."""
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        refused = StartRefused if isinstance(error, PermissionError) else StartError
        raise refused(f"cannot listen on HOST={host}, PORT={port}: {error}") from None
    return listeners


class Server(uvicorn.Server):
    """uvicorn, which drains before it closes sockets and whose exit status tells of a dead engine."""

    def __init__(self, app: Any, settings: Settings, lifecycle: Lifecycle) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=HttpProtocol,
                ws=WebSocketProtocol,
                ws_ping_interval=settings.ping_interval_s,
                ws_ping_timeout=settings.ping_interval_s,
                ws_max_size=settings.max_frame_bytes,
                ws_per_message_deflate=False,  # costs memory a socket, gains nothing on token frames
                log_config=None,
                access_log=False,
                lifespan="on",
                server_header=False,
                # By default uvicorn trusts every client of this host. It reads FORWARDED_ALLOW_IPS if none are given.
                proxy_headers=bool(settings.proxies),
                forwarded_allow_ips=settings.proxies,
                timeout_graceful_shutdown=3,
            )
        )
        self.lifecycle, self._settings = lifecycle, settings
        self.drained: asyncio.Task[None] | None = None
        self.bound_port = settings.port
        self._stop_signal: int | None = None
        self._port_is_held = False
        self._record = Record(settings.state, settings.models, build().version)

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(_SWITCH_S)
        begun, expected_s = time.monotonic(), self._record.last_seconds
        told = "" if expected_s is None else f" The last start took {expected_s:.0f} s."
        notify(f"STATUS=Opening the engines.{told}")
        if sockets is None and self._settings.listen_fds and self._settings.listen_pid == os.getpid():
            self._port_is_held = True
            sockets = [socket.socket(fileno=FIRST_PASSED_FD)]
            self._settings.check_address(str(sockets[0].getsockname()[0]))
        elif sockets is None:
            sockets = _listen(self._settings.host, self._settings.port)
        try:
            with Opening(sockets, expected_s):
                await super().startup(sockets=sockets)
        except SystemExit:
            if self._stop_signal is not None:
                raise SystemExit(128 + self._stop_signal) from None
            if self.lifecycle.failure is not None:
                raise self.lifecycle.failure from None
            raise
        if self.should_exit:
            return
        host, self.bound_port = self.servers[0].sockets[0].getsockname()[:2]
        bound = [listener.getsockname()[0] for server in self.servers for listener in server.sockets]
        self.lifecycle.on_loopback = all(ipaddress.ip_address(address).is_loopback for address in bound)
        self.lifecycle.address = f"[{host}]:{self.bound_port}" if ":" in host else f"{host}:{self.bound_port}"
        self.lifecycle.phase = "ready"
        self.lifecycle.start_s = time.monotonic() - begun
        self._record.keep(self.lifecycle.start_s)
        warnings = logs.attention()
        self.lifecycle.start_told = of_start(self._record, warnings)
        redact.serving()
        self.lifecycle.tell("READY=1")
        if self._stop_signal is not None:  # it came during an import that swallows every exception
            self.begin_drain()
        service = self.lifespan.state["service"]
        _log.info(
            "server.ready",
            url=f"http://{self.lifecycle.address}",
            pid=os.getpid(),
            version=build().version,
            commit=build().commit,
            address=self.lifecycle.address,
            models=msgspec.to_builtins(service.runtime.models),
            weights={role: engine.weights for role, engine in service.runtime.engines.distinct.items()},
            connections=service.admission.fitting,
            after=self._record.after,
            warnings=warnings,
        )

    async def shutdown(self, sockets: Any = None) -> None:
        await super().shutdown(sockets=sockets)
        self._record.ended("engine" if self.lifecycle.phase == "dead" else "stop")

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.lifecycle.exit_requested.is_set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once. Before the start is finished there is nothing
        to drain."""
        first, self._stop_signal = self._stop_signal is None, sig
        if not self.started:
            _silence_uvicorn()
            raise SystemExit(128 + sig)
        # Nothing more in here: a handler may interrupt a log line.
        self._loop.call_soon_threadsafe(self.begin_drain if first else self._end_at_once)
        if not first:
            signal.signal(sig, signal.SIG_DFL)  # a third one needs no loop

    def begin_drain(self) -> None:
        if self.drained is None:
            if self._port_is_held:
                for server in self.servers:
                    server.close()  # who comes now waits in systemd's socket for the next process
            admission = self.lifespan.state["service"].admission
            self.drained = asyncio.create_task(self.lifecycle.drain(admission, self._settings.drain_timeout_s))

    def _end_at_once(self) -> None:
        """Waits for nothing, not even for an engine that is closing."""
        _log.warning("drain.abandoned", signal=self._stop_signal)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + (self._stop_signal or 0))

    @property
    def exit_status(self) -> int:
        return 1 if self.lifecycle.phase == "dead" else 0
