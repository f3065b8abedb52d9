"""The HTTP routes: health, status, metrics, the protocol's document, tickets."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from yaptext.build import build
from yaptext.dialogue import persona
from yaptext.errors import WireError
from yaptext.observe.metrics import CONTENT_TYPE
from yaptext.server.access.accounts import Account
from yaptext.server.access.caller import address, check_host, is_proxied
from yaptext.server.access.tickets import TTL_S
from yaptext.server.service import Service
from yaptext.settings import DEFAULT_API_KEY, LOOPBACK

_SILENT = "engine_silent"
_MOST_TAGS = 16
"""Of one If-None-Match."""


async def healthz(request: Request) -> Response:
    """200 while the engines live and answer, or are away: a restart of this process would bring none of those back."""
    check_host(request)
    service: Service = request.state.service
    if not await service.alive():
        return _json({"status": "engine_dead"}, 503)
    if any(pulse.silent_since is not None for pulse in service.lifecycle.pulses):
        return _json({"status": _SILENT, "reason": service.lifecycle.silence}, 503)
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
    identify(request)
    now, engines = service.snapshot(), service.runtime.engines
    running = _SILENT if now.silence is not None else "degraded" if engines.lacking else "running"
    return _json(
        {
            # `running` and `healthy` are what monitors of the guide's server look for.
            "status": running if now.phase == "ready" else now.phase,
            "healthy": now.phase != "dead" and now.silence is None,
            "silence": now.silence,
            "reload": now.reload,
            "lacking": engines.lacking,
            "version": build().version,
            "commit": build().commit,
            "uptime_s": round(time.monotonic() - service.started_at, 1),
            "deploy_models": service.settings.deploy_models,
            "concurrent_model_call": service.settings.concurrent_model_call,
            "demo": engines.demo,
            "connections": now.capacity,
            "session_tokens": round(now.session_tokens),
            "sessions": now.sessions,
            "session_bytes": now.session_bytes,
            "session_bytes_max": service.runtime.sessions.bounds.bytes,
            "session_file_failing": now.session_file_failing,
            "models": service.runtime.models,
            "personas": list(persona.styles()),
            "prompt": service.runtime.prompt_facts,
            "engines": {
                role: {
                    "model": engine.model,
                    "quantization": engine.weights,
                    "max_model_len": engine.codec.max_model_len,
                    "running": load.running,
                    "kv_use": round(load.kv_use, 4),
                    "kv_tokens": engine.cache_tokens,
                    "backlog_ms": round(load.backlog_ms, 1),
                    "prefill_tokens_per_s": round(load.prefill_tokens_per_s),
                }
                for role, (engine, load) in now.engines.items()
            },
        }
    )


async def metrics(request: Request) -> Response:
    """Prometheus text; without a key only for callers on this host, of which a proxy that calls for others is none."""
    service: Service = request.state.service
    local = request.client is not None and request.client.host in LOOPBACK
    if not local or is_proxied(request):
        identify(request)
    else:
        check_host(request)
    return Response(service.runtime.metrics.exposition(service.refresh_gauges), media_type=CONTENT_TYPE)


def document(content: Any) -> Callable[[Request], Awaitable[Response]]:
    """A route of JSON that stays the same as long as the service runs."""
    return file(msgspec.json.encode(content), "application/json", {})


def file(encoded: bytes, media_type: str, more_headers: Mapping[str, str]) -> Callable[[Request], Awaitable[Response]]:
    """A route of bytes that stay the same as long as the service runs. Clients may keep them by their ETag."""
    etag = f'"{hashlib.sha256(encoded).hexdigest()[:32]}"'

    async def describe(request: Request) -> Response:
        check_host(request)
        headers = {"ETag": etag, "Cache-Control": "no-cache", **more_headers}
        tags = request.headers.get("if-none-match", "").split(",", _MOST_TAGS)
        if {tag.strip().removeprefix("W/") for tag in tags} & {etag, "*"}:
            return Response(None, 304, headers)
        return Response(encoded, 200, headers, media_type=media_type)

    return describe


async def ticket(request: Request) -> Response:
    """What opens `/ws` once instead of the caller's key, which comes in a header: addresses get logged."""
    service: Service = request.state.service
    account = identify(request, in_query=False)
    return _json({"ticket": service.keys.ticket(account), "expires_in_s": TTL_S}, headers={"Cache-Control": "no-store"})


def identify(request: Request, *, in_query: bool = True) -> Account:
    """The caller of an HTTP route that needs a key. Raises as `Keys.identify` does; and `HostNotAllowed`, as any page
    knows the default key."""
    service: Service = request.state.service
    if service.settings.own_key == DEFAULT_API_KEY:
        check_host(request)
    return service.keys.identify(request, in_query=in_query)


async def wrong_host(_: Request, error: Exception) -> Response:
    return _json({"error_code": "host_not_allowed", "message": str(error), "detail": str(error)}, 403)


async def turned_away(request: Request, error: Exception) -> Response:
    assert isinstance(error, WireError)
    status = 401 if error.retry_after_ms is None else 429
    service: Service = request.state.service
    service.refusals.tell("request.refused", address(request), status=status, error_code=error.code)
    content = {"error_code": error.code, "message": error.message, "detail": error.message}
    if error.retry_after_ms is None:
        return _json(content, status)
    return _json(content, status, {"Retry-After": str(math.ceil(error.retry_after_ms / 1000))})


def _json(content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status_code, headers, media_type="application/json")
