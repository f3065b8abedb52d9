"""The door of `/v1/`: key, origin, slot, one turn. A refused client gets the reason as OpenAI's clients read it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from yaptext.errors import BadMessage, HostNotAllowed, Internal, NotDeployed, WireError
from yaptext.server.access.accounts import Account
from yaptext.server.access.caller import address, check_origin
from yaptext.server.http import identify
from yaptext.server.openai import errors
from yaptext.server.openai.asked import Asked, asked_of_chat, asked_of_responses
from yaptext.server.openai.completion import Completion
from yaptext.server.openai.events import Events, as_sse
from yaptext.server.openai.reading import reader
from yaptext.server.openai.request import model_names
from yaptext.server.openai.responses_schema import ResponsesRequest
from yaptext.server.openai.schema import ChatRequest
from yaptext.server.service import Service
from yaptext.server.socket import LARGE_BYTES
from yaptext.wire.frames import error_frame

_log = structlog.get_logger(__name__)


class Completions:
    """A route whose body is answered with a turn."""

    def __init__(self, body: type[Any], asked: Callable[[Service, Account, Any], Asked]) -> None:
        self._decode, self._asked = reader(body), asked

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive, send)
        completion: Completion | None = None
        try:
            service, account = _admitted(request)
            account.spend("messages")
            body = await self._read(request, service)
            account.spend("turns")
            completion = Completion(scope, receive, send, service.runtime, account.name)
            with service.admission.slot(account, completion):
                completion.admit()
                asked = self._asked(service, account, body)
                async with asked.turn(service.runtime, account) as (session, wanted):
                    await completion.run(session, wanted, asked)
        except (WireError, HostNotAllowed) as error:
            await _refused(request, error)(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception:
            _log.exception("completion.crashed")
            if completion is not None and completion.begun:
                raise
            await _refused(request, Internal("The request failed by a fault of the service."))(scope, receive, send)

    async def _read(self, request: Request, service: Service) -> Any:
        limit = service.settings.max_frame_bytes
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise BadMessage(f"the body is more than {limit} bytes; limit is {limit} (MAX_FRAME_BYTES)")
            parts.append(part)
        body = b"".join(parts)
        if size <= LARGE_BYTES:
            return self._decode(body)
        async with service.runtime.large_frames:  # each takes milliseconds: one in a round of the loop
            await asyncio.sleep(0)
            return self._decode(body)


def _asked_of_responses(service: Service, account: Account, body: ResponsesRequest) -> Asked:
    if body.generate is False:
        raise BadMessage("generate is for the socket; to warm a prompt, set max_output_tokens to 1 - at $.generate")
    return asked_of_responses(service.runtime, account, body, Events(body, as_sse))


chat_completions = Completions(ChatRequest, lambda _, __, body: asked_of_chat(body))
responses = Completions(ResponsesRequest, _asked_of_responses)


async def models(request: Request) -> Response:
    """`GET /v1/models`, and one of them by its name."""
    try:
        service, _ = _admitted(request)
        created = round(time.time() - time.monotonic() + service.started_at)
        known = [
            {"id": name, "object": "model", "created": created, "owned_by": "yap-text"}
            for name in model_names(service.runtime)
        ]
        name = request.path_params.get("name")
        if name is None:
            return _json({"object": "list", "data": known})
        for model in known:
            if model["id"] == name:
                return _json(model)
        raise NotDeployed(f"The model {name[:100]!r} does not exist - at $.model")
    except (WireError, HostNotAllowed) as error:
        return _refused(request, error)


def _admitted(request: Request) -> tuple[Service, Account]:
    """Raises what refuses a client before its body is read."""
    service: Service = request.state.service
    check_origin(request, service.settings)
    account = identify(request, in_query=False)
    if service.lifecycle.phase == "draining":
        raise service.lifecycle.going_away()
    return service, account


def _refused(request: Request, error: WireError | HostNotAllowed) -> Response:
    service: Service = request.state.service
    if isinstance(error, HostNotAllowed):
        content = {"message": str(error), "type": "invalid_request_error", "param": None, "code": "host_not_allowed"}
        return _json({"error": content}, 403)
    frame = error_frame(error)
    status = errors.status_of(frame)
    service.runtime.metrics.errors.labels(error.code).inc()
    service.refusals.tell("request.refused", address(request), status=status, error_code=error.code)
    return _json(errors.body_of(frame), status, errors.headers_of(frame))


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
