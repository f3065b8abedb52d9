"""The server process: uvicorn, its sockets, signals."""

from __future__ import annotations

import asyncio
import ipaddress
import multiprocessing
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import msgspec
import structlog
import uvicorn

from yaptext.build import build
from yaptext.errors import StartError, StartRefused
from yaptext.observe import logs, redact
from yaptext.observe.systemd import notify
from yaptext.server.drain import drain
from yaptext.server.lifecycle import Lifecycle, of_start, silence_uvicorn
from yaptext.server.opening import Opening
from yaptext.server.record import Record
from yaptext.server.transport import HttpProtocol, WebSocketProtocol
from yaptext.settings import FIRST_PASSED_FD, Settings

_log = structlog.get_logger(__name__)
_SWITCH_S = 0.0005
"""How long a thread may keep the interpreter while the event loop waits for it; Python's default is 5 ms."""
_BACKLOG = 1024


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
    """uvicorn that drains before it closes sockets; its exit status is 1 if an engine died."""

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
            with Opening(sockets, expected_s, page=self._settings.playground):
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
        self._invite()

    def _invite(self) -> None:
        """The last line of a start at a terminal: what a person does next."""
        host, colon, port = self.lifecycle.address.rpartition(":")
        everywhere = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # addresses that no browser opens
        where = f"http://{everywhere.get(host, host)}{colon}{port}"
        what = f"{where} - open it in a browser" if self._settings.playground else where
        for stream in (sys.stderr, sys.stdout):
            if stream.isatty():
                print(f"\nYap Text serves on {what}. Ctrl-C stops it.", file=stream, flush=True)
                return

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
            silence_uvicorn()
            raise SystemExit(128 + sig)
        # Nothing more in here: a handler may interrupt a log line.
        self._loop.call_soon_threadsafe(self.begin_drain if first else self._end_at_once)
        if not first:
            signal.signal(sig, signal.SIG_DFL)  # a third one needs no loop

    def begin_drain(self) -> None:
        if self.drained is None:
            if self._port_is_held:
                for server in self.servers:
                    server.close()  # new clients now wait in systemd's socket for the next process
            slots = self.lifespan.state["service"].admission.slots
            self.drained = asyncio.create_task(drain(self.lifecycle, slots, self._settings.drain_timeout_s))

    def _end_at_once(self) -> None:
        """Waits for nothing, not even for an engine that is closing."""
        _log.warning("drain.abandoned", signal=self._stop_signal)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + (self._stop_signal or 0))

    @property
    def exit_status(self) -> int:
        return 1 if self.lifecycle.phase == "dead" else 0
