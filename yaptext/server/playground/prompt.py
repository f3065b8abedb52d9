"""`POST /playground/prompt`: what the models would be sent for a turn that does not run."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from yaptext.dialogue import shown_prompt
from yaptext.dialogue.incoming import request_of
from yaptext.engine.base import whose
from yaptext.errors import BadMessage, RateLimited, WireError
from yaptext.server.http import identify
from yaptext.server.service import Service
from yaptext.wire.frames import Start
from yaptext.wire.reading import read


async def prompt(request: Request) -> Response:
    """The body is a frame `start`, of at most 64 KiB (`transport`), and is refused for what that would be refused for.
    Costs the key a message. Nothing of the body is kept or logged."""
    service: Service = request.state.service
    runtime, account = service.runtime, identify(request, in_query=False)
    account.spend("messages")
    whose.set(account.name)
    try:
        body = await request.body()
        async with runtime.large_frames:  # each may take milliseconds: one in a round of the loop
            await asyncio.sleep(0)
            message, ignored = read(body)
        if not isinstance(message, Start):
            raise BadMessage("Only a frame start has a prompt - at $.type")
        turn = await request_of(runtime, message, account.name, account.spend, ignored)
        session = await runtime.sessions.fetch((account.name, message.session_id))
        async with runtime.large_frames:  # a long history is rendered whole
            await asyncio.sleep(0)
            shown = await shown_prompt.of_turn(runtime, session, turn)
    except ClientDisconnect:
        return _refused(BadMessage("The body is not whole."))  # nobody reads it
    except RateLimited:
        raise
    except WireError as error:
        return _refused(error)
    return _json(shown, 200)


def _refused(error: WireError) -> Response:
    return _json({"error_code": error.code, "message": error.message, "detail": error.message}, 400)


def _json(content: object, status: int) -> Response:
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
