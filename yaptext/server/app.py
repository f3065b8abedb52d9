"""The ASGI application: routes, and a lifespan that opens the engines."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import msgspec
import structlog
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from yaptext.build import build
from yaptext.dialogue import persona, warming
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session_store import SessionStore
from yaptext.dialogue.tools import ToolSet
from yaptext.engine.base import Engines
from yaptext.errors import (
    AuthenticationFailed,
    EngineDead,
    GoingAway,
    HostNotAllowed,
    RateLimited,
    ServerAtCapacity,
    SettingsError,
    StartError,
    WireError,
)
from yaptext.observe import logs
from yaptext.observe.metrics import CONTENT_TYPE
from yaptext.server.access.accounts import Account, Keys
from yaptext.server.access.keyfile import Limits
from yaptext.server.access.throttle import Sparing
from yaptext.server.access.tickets import TTL_S
from yaptext.server.admission import Admission
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.pending import Lobby, fitting
from yaptext.server.ws.connection import Connection
from yaptext.server.ws.door import check_host, check_origin
from yaptext.settings import DEFAULT_API_KEY, LOOPBACK, Settings
from yaptext.wire import asyncapi
from yaptext.wire.frames import encode, error_frame

_log = structlog.get_logger(__name__)
OpenEngines = Callable[[Settings], Engines]
_OF_PROXIES = ("forwarded", "x-forwarded-for", "via")
_SILENT = "engine_silent"
_MOST_TAGS = 16
"""Of one If-None-Match."""


class Document(NamedTuple):
    """JSON that stays the same as long as the service runs, and its name for caches."""

    content: bytes
    etag: str

    @classmethod
    def of(cls, content: Any) -> Document:
        encoded = msgspec.json.encode(content)
        return cls(encoded, f'"{hashlib.sha256(encoded).hexdigest()[:32]}"')


@dataclass(frozen=True, slots=True)
class Service:
    """What requests share; lives in the lifespan state."""

    settings: Settings
    runtime: Runtime
    admission: Admission
    lobby: Lobby
    keys: Keys
    lifecycle: Lifecycle
    refusals: Sparing
    described: Document
    started_at: float

    async def alive(self) -> bool:
        try:
            for engine in self.runtime.engines.distinct.values():
                await engine.check()
        except EngineDead:
            return False
        return self.lifecycle.phase != "dead"

    def refresh_gauges(self) -> None:
        metrics = self.runtime.metrics
        metrics.connections.set(len(self.admission.connections))
        metrics.sessions.set(len(self.runtime.sessions))
        metrics.session_bytes.set(self.runtime.sessions.held.bytes)
        metrics.session_file_failing.set(self.runtime.sessions.file_failing)
        metrics.tasks.set(len(asyncio.all_tasks()))
        metrics.connections_max.set(self.admission.fitting)
        metrics.reload_failed.set(self.lifecycle.reload is not None and not self.lifecycle.reload.ok)
        for pulse in self.lifecycle.pulses:
            metrics.engine_silent.labels(pulse.role).set(pulse.silent_since is not None)
        for role, engine in self.runtime.engines.distinct.items():
            load = engine.load()
            metrics.engine_running.labels(role).set(load.running)
            metrics.engine_requests.labels(role).set(load.requests)
            metrics.engine_kv_use.labels(role).set(load.kv_use)
            metrics.engine_backlog_ms.labels(role).set(load.backlog_ms)


def open_vllm(settings: Settings) -> Engines:
    from yaptext.engine.vllm.startup import open_engines  # seconds of imports, only where it serves

    return open_engines(settings)


def create_app(
    settings: Settings, *, open_engines: OpenEngines = open_vllm, lifecycle: Lifecycle | None = None
) -> Starlette:
    """The service as an ASGI app. `open_engines` is the seam where tests and benches replace vLLM."""
    lifecycle, described = lifecycle or Lifecycle(), Document.of(asyncapi.document())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        with lifecycle.starting():
            # Before the engines: a typo is told at once.
            tools = ToolSet.from_file(settings.tools_file)
            persona.use_folder(settings.personas_dir)
            persona.check_style(settings.default_persona_style)
            keys = _keys(settings)
            sessions = SessionStore.of(settings)
            engines = open_engines(settings)
        try:
            with lifecycle.starting():
                runtime = await Runtime.open(settings, engines, tools, sessions)
                await _warm_up(runtime)
            gc.collect()
            gc.freeze()  # what is here now stays: a full collection need not look at it while streams wait
            busiest = engines.chat or engines.tool
            assert busiest is not None
            most, pending = fitting(settings.max_connections(awq=engines.awq), settings.max_pending_handshakes)
            admission = Admission(
                most,
                floor=settings.usual_connections(awq=engines.awq),
                max_backlog_ms=settings.max_backlog_ms,
                load=busiest.load,
                cache_tokens=settings.kv_overcommit * busiest.cache_tokens,
                session_tokens=lambda: runtime.metrics.session_tokens,
            )
            lobby = Lobby(pending, settings.handshake_timeout_s)
            rewarming = lifecycle.while_ready(warming.rewarm(runtime, most))
            troubles = lifecycle.keep_told(lambda: list(filter(None, (sessions.trouble, logs.file_failure()))))
            watching = lifecycle.watching(
                engines, admission, settings.watchdog_s, warming.keep_warm(runtime), rewarming, troubles
            )
            reload = partial(_reload, settings, keys, lifecycle)
            async with watching, keys.reloading(on_hangup=settings.reloads, reload=reload):
                refusals = Sparing(_log.info, settings.log_address)
                since = time.monotonic()
                service = Service(settings, runtime, admission, lobby, keys, lifecycle, refusals, described, since)
                yield {"service": service}
        finally:
            at_once = lifecycle.phase == "dead"
            closing = [engine.aclose(at_once=at_once) for engine in engines.distinct.values()]
            await asyncio.gather(asyncio.to_thread(sessions.close), *closing)

    app = Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/livez", healthz),
            Route("/readyz", readyz),
            Route("/status", status),
            Route("/metrics", metrics),
            Route("/asyncapi.json", describe),
            Route("/ticket", ticket, methods=["POST"]),
            WebSocketRoute("/ws", converse),
        ],
        exception_handlers={
            AuthenticationFailed: _turned_away,
            RateLimited: _turned_away,
            HostNotAllowed: _wrong_host,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # it would send a key that is in the address to wherever `Host` says
    return app


async def _reload(settings: Settings, keys: Keys, lifecycle: Lifecycle) -> None:
    with lifecycle.reloading() as refused:
        refused.extend(filter(None, (_reload_personas(settings), await keys.reload())))


def _reload_personas(settings: Settings) -> str | None:
    """Takes the operator's styles as they are now. A wrong file changes nothing; then returns why."""
    if settings.personas_dir is None:
        return None
    try:
        persona.use_folder(settings.personas_dir)
        persona.check_style(settings.default_persona_style)
    except SettingsError as error:
        _log.error("personas.refused", error=str(error))
        return str(error)
    _log.info("personas.loaded", styles=list(persona.styles()))
    return None


def _keys(settings: Settings) -> Keys:
    limits = Limits(
        settings.key_max_connections,
        settings.key_turns_per_minute,
        settings.key_messages_per_minute,
        settings.key_cancels_per_minute,
    )
    return Keys(settings.own_key, settings.key_file, limits, failures_per_minute=settings.failed_keys_per_minute)


async def _warm_up(runtime: Runtime) -> None:
    """Raises `StartError`."""
    begun = time.monotonic()
    try:
        await warming.prime(runtime)
    except WireError as error:
        raise StartError(f"the warm-up turn failed: {error}") from error
    _log.info("engines.warm", seconds=round(time.monotonic() - begun, 1))


async def healthz(request: Request) -> Response:
    """200 while the engines live and answer."""
    check_host(request)
    service: Service = request.state.service
    if not await service.alive():
        return _json({"status": "engine_dead"}, 503)
    if (silence := service.lifecycle.silence) is not None:
        return _json({"status": _SILENT, "reason": silence}, 503)
    return _json({"status": "ok"})


async def readyz(request: Request) -> Response:
    """200 while new conversations are welcome: engines live and answer, and no drain has begun."""
    check_host(request)
    service: Service = request.state.service
    phase = service.lifecycle.phase if await service.alive() else "dead"
    if phase == "ready" and (silence := service.lifecycle.silence) is not None:
        return _json({"status": _SILENT, "reason": silence}, 503)
    return _json({"status": phase}, 200 if phase == "ready" else 503)


async def status(request: Request) -> Response:
    service: Service = request.state.service
    _identify(request)
    engines, phase = service.runtime.engines, service.lifecycle.phase
    silence = service.lifecycle.silence
    running = _SILENT if silence is not None else "degraded" if engines.lacking else "running"
    loads = {role: (engine, engine.load()) for role, engine in engines.distinct.items()}
    return _json(
        {
            # `running` and `healthy` are what monitors of the guide's server look for.
            "status": running if phase == "ready" else phase,
            "healthy": phase != "dead" and silence is None,
            "silence": silence,
            "reload": service.lifecycle.reload,
            "lacking": engines.lacking,
            "version": build().version,
            "commit": build().commit,
            "uptime_s": round(time.monotonic() - service.started_at, 1),
            "deploy_models": service.settings.deploy_models,
            "concurrent_model_call": service.settings.concurrent_model_call,
            "demo": engines.demo,
            "connections": msgspec.to_builtins(service.admission.capacity),
            "session_tokens": round(service.runtime.metrics.session_tokens),
            "sessions": len(service.runtime.sessions),
            "session_bytes": service.runtime.sessions.held.bytes,
            "session_bytes_max": service.runtime.sessions.bounds.bytes,
            "session_file_failing": service.runtime.sessions.file_failing,
            "models": msgspec.to_builtins(service.runtime.models),
            "personas": list(persona.styles()),
            "prompt": service.runtime.prompt_facts,
            "engines": {
                role: {
                    "model": engine.model,
                    "quantization": engine.weights,
                    "max_model_len": engine.max_model_len,
                    "running": load.running,
                    "kv_use": round(load.kv_use, 4),
                    "kv_tokens": engine.cache_tokens,
                    "backlog_ms": round(load.backlog_ms, 1),
                    "prefill_tokens_per_s": round(load.prefill_tokens_per_s),
                }
                for role, (engine, load) in loads.items()
            },
        }
    )


async def metrics(request: Request) -> Response:
    """Prometheus text; without a key only for callers on this host, of which a proxy that calls for others is none."""
    service: Service = request.state.service
    local = request.client is not None and request.client.host in LOOPBACK
    if not local or any(name in request.headers for name in _OF_PROXIES):
        _identify(request)
    else:
        check_host(request)
    return Response(service.runtime.metrics.exposition(service.refresh_gauges), media_type=CONTENT_TYPE)


async def describe(request: Request) -> Response:
    check_host(request)
    document: Document = request.state.service.described
    headers = {"ETag": document.etag, "Cache-Control": "no-cache"}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",", _MOST_TAGS)}
    if known & {document.etag, "*"}:
        return Response(None, 304, headers)
    return Response(document.content, 200, headers, media_type="application/json")


async def ticket(request: Request) -> Response:
    """What opens `/ws` once in the place of the caller's key, which comes in a header: addresses get logged."""
    service: Service = request.state.service
    account = _identify(request, in_query=False)
    return _json({"ticket": service.keys.ticket(account), "expires_in_s": TTL_S}, headers={"Cache-Control": "no-store"})


async def converse(websocket: WebSocket) -> None:
    """`/ws`: key, slot, conversation. A refused client is told why in a frame, then closed."""
    service: Service = websocket.state.service
    try:
        check_origin(websocket, service.settings)
        account = service.keys.identify(websocket)
        if service.lifecycle.phase == "draining":
            raise service.lifecycle.going_away()
        connection = Connection(websocket, service.runtime, account)
        with account.slot(connection), service.admission.slot(connection):
            await websocket.accept()
            ending = await connection.serve()
        session_id = connection.session_id
        _log.info("connection.closed", key=account.name, code=ending.code, reason=ending.reason, session_id=session_id)
    except WireError as refusal:
        await _refuse(websocket, service, refusal)


async def _refuse(websocket: WebSocket, service: Service, refusal: WireError) -> None:
    service.runtime.metrics.errors.labels(refusal.code).inc()
    service.refusals.tell("connection.refused", _address(websocket), error_code=refusal.code)
    capacity = service.admission.capacity if isinstance(refusal, ServerAtCapacity) else UNSET
    frame = encode(error_frame(refusal, capacity=capacity))
    try:
        if isinstance(refusal, GoingAway) and any(name in websocket.headers for name in _OF_PROXIES):
            # A proxy can still ask another server, as long as no socket is open. A client gets the frame instead:
            # browsers are not shown the status of a handshake.
            wait = {"Retry-After": str(math.ceil((refusal.retry_after_ms or 0) / 1000))}
            await websocket.send_denial_response(Response(frame, 503, wait, media_type="application/json"))
            return
        await websocket.accept()
        await websocket.send_text(frame.decode())
        await websocket.close(refusal.close_code or ServerAtCapacity.close_code)
    except WebSocketDisconnect:
        pass  # it left before it was told


def _identify(request: Request, *, in_query: bool = True) -> Account:
    """The caller of an HTTP route that needs a key. Raises as `Keys.identify` does; and `HostNotAllowed`, as any page
    knows the default key."""
    service: Service = request.state.service
    if service.settings.own_key == DEFAULT_API_KEY:
        check_host(request)
    return service.keys.identify(request, in_query=in_query)


async def _wrong_host(_: Request, error: Exception) -> Response:
    return _json({"error_code": "host_not_allowed", "message": str(error), "detail": str(error)}, 403)


async def _turned_away(request: Request, error: Exception) -> Response:
    assert isinstance(error, WireError)
    status = 401 if error.retry_after_ms is None else 429
    service: Service = request.state.service
    service.refusals.tell("request.refused", _address(request), status=status, error_code=error.code)
    content = {"error_code": error.code, "message": error.message, "detail": error.message}
    if error.retry_after_ms is None:
        return _json(content, status)
    return _json(content, status, {"Retry-After": str(math.ceil(error.retry_after_ms / 1000))})


def _address(connection: HTTPConnection) -> str:
    return connection.client.host if connection.client else ""


def _json(content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status_code, headers, media_type="application/json")
