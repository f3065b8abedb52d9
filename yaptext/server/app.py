"""The ASGI application: routes, the lifespan that opens the engines."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute

from yaptext.dialogue import persona, warming
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session_store import SessionStore
from yaptext.dialogue.tools import ToolSet
from yaptext.engine import registry
from yaptext.engine.base import Engines
from yaptext.errors import AuthenticationFailed, HostNotAllowed, RateLimited, StartError, WireError
from yaptext.observe import logs
from yaptext.server import http
from yaptext.server.access.accounts import Keys
from yaptext.server.access.keyfile import Limits
from yaptext.server.access.sparing import Sparing
from yaptext.server.admission import Admission
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.openai import door as openai
from yaptext.server.openai.responses_socket import respond
from yaptext.server.pending import PendingConnections, fitting
from yaptext.server.playground import pages
from yaptext.server.reference import pages as reference
from yaptext.server.reload import on_hangup, reload
from yaptext.server.service import Service
from yaptext.server.watch import watching
from yaptext.server.ws import door
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)
OpenEngines = Callable[[Settings], Engines]


def create_app(
    settings: Settings, *, open_engines: OpenEngines = registry.open_engines, lifecycle: Lifecycle | None = None
) -> Starlette:
    """The service as an ASGI app. `open_engines` is the seam where tests and benches replace vLLM."""
    lifecycle = lifecycle or Lifecycle()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        with lifecycle.starting():
            # Before the engines: a typo is reported at once.
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
            waiting = PendingConnections(pending, settings.handshake_timeout_s)
            rewarming = lifecycle.while_ready(warming.rewarm(runtime, most))
            troubles = lifecycle.keep_told(lambda: list(filter(None, (sessions.trouble, logs.file_failure()))))
            slots, besides = admission.slots, (warming.keep_warm(runtime), rewarming, troubles)
            renew = partial(reload, settings, keys, slots, lifecycle)
            reloading = on_hangup(renew) if settings.reloads else nullcontext()
            async with watching(lifecycle, engines, slots, settings.watchdog_s, *besides), reloading:
                refusals = Sparing(_log.info, settings.log_address)
                since = time.monotonic()
                service = Service(settings, runtime, admission, waiting, keys, lifecycle, refusals, since)
                yield {"service": service}
        finally:
            at_once = lifecycle.phase == "dead"
            closing = [engine.aclose(at_once=at_once) for engine in engines.distinct.values()]
            await asyncio.gather(asyncio.to_thread(sessions.close), *closing)

    app = Starlette(
        routes=[
            Route("/healthz", http.healthz),
            Route("/livez", http.healthz),
            Route("/readyz", http.readyz),
            Route("/status", http.status),
            Route("/metrics", http.metrics),
            *reference.routes(),
            Route("/ticket", http.ticket, methods=["POST"]),
            Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
            Route("/v1/responses", openai.responses, methods=["POST"]),
            Route("/v1/models", openai.models),
            Route("/v1/models/{name:path}", openai.models),
            WebSocketRoute("/ws", door.converse),
            WebSocketRoute("/v1/responses", respond),
            *pages.routes(settings),
        ],
        exception_handlers={
            AuthenticationFailed: http.turned_away,
            RateLimited: http.turned_away,
            HostNotAllowed: http.wrong_host,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # it would send a key that is in the address to wherever `Host` says
    return app


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
