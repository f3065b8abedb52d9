"""The door of `/v1/`: key, origin, slot, one turn. A refused client gets the reason as OpenAI's clients read it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.dialogue.transcript import Transcript
from yaptext.errors import BadMessage, HostNotAllowed, Internal, NotDeployed, WireError
from yaptext.server.access.accounts import Account
from yaptext.server.access.caller import address, check_origin
from yaptext.server.http import identify
from yaptext.server.openai import errors
from yaptext.server.openai.chunks import Chunks
from yaptext.server.openai.completion import Completion
from yaptext.server.openai.request import model_names, request_of, session_id_of
from yaptext.server.openai.schema import ChatRequest
from yaptext.server.service import Service
from yaptext.wire.frames import error_frame

_log = structlog.get_logger(__name__)
_LARGE_BYTES = 32_768
_decode = msgspec.json.Decoder(ChatRequest).decode


class ChatCompletions:
    """`POST /v1/chat/completions`."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive, send)
        completion: Completion | None = None
        try:
            service, account = _admitted(request)
            account.spend("messages")
            body = await _read(request, service)
            account.spend("turns")
            completion = Completion(scope, receive, send, service.runtime, account.name)
            with service.admission.slot(account, completion):
                completion.admit()
                await _complete(service.runtime, account, body, completion)
        except (WireError, HostNotAllowed) as error:
            await _refused(request, error)(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception:
            _log.exception("completion.crashed")
            if completion is not None and completion.begun:
                raise
            await _refused(request, Internal("The request failed by a fault of the service."))(scope, receive, send)


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


async def _read(request: Request, service: Service) -> ChatRequest:
    limit = service.settings.max_frame_bytes
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BadMessage(f"the body is more than {limit} bytes; limit is {limit} (MAX_FRAME_BYTES)")
        parts.append(part)
    body = b"".join(parts)
    try:
        if size <= _LARGE_BYTES:
            return _decode(body)
        async with service.runtime.large_frames:  # each takes milliseconds: one in a round of the loop
            await asyncio.sleep(0)
            return _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise BadMessage(str(error).replace("`", "")) from None


async def _complete(runtime: Runtime, account: Account, body: ChatRequest, completion: Completion) -> None:
    """The turn has a session of its own, so that requests of one session may run beside each other; what it leaves is
    the named session's."""
    session_id = session_id_of(body)
    named = None if session_id is None else runtime.sessions.open((account.name, session_id))
    request = await request_of(runtime, body, account, named)
    own = Session((account.name, session_id or ""))
    own.forgotten = True  # nothing of it is kept
    if named is not None:
        own.seed, own.turns = named.seed, named.turns
        own.transcript, named.transcript = named.transcript, Transcript()  # with its token ids
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    chunks = Chunks(body.model or "chat", with_usage=bool(with_usage), one_call=body.parallel_tool_calls is False)
    try:
        await completion.run(own, request, chunks, stream=bool(body.stream))
    finally:
        if named is not None:
            named.turns = max(named.turns, own.turns)
            if named.current is None and not named.forgotten:  # else a turn of `/ws` has it
                named.transcript = own.transcript
            runtime.sessions.keep(named)


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
