"""The door of `/ws`: origin, key, slot, conversation. A refused client gets the reason in a frame, then its close."""

from __future__ import annotations

import math

import structlog
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from yaptext.errors import GoingAway, ServerAtCapacity, WireError
from yaptext.server.access.caller import address, check_origin, is_proxied
from yaptext.server.service import Service
from yaptext.server.ws.connection import Connection
from yaptext.wire.frames import encode, error_frame

_log = structlog.get_logger(__name__)


async def converse(websocket: WebSocket) -> None:
    """One socket, from its handshake to its close."""
    service: Service = websocket.state.service
    try:
        check_origin(websocket, service.settings)
        account = service.keys.identify(websocket)
        if service.lifecycle.phase == "draining":
            raise service.lifecycle.going_away()
        connection = Connection(websocket, service.runtime, account, at_rest=service.admission.slots.at_rest)
        with service.admission.slot(account, connection):
            await websocket.accept()
            ending = await connection.serve()
        session_id = connection.session_id
        _log.info("connection.closed", key=account.name, code=ending.code, reason=ending.reason, session_id=session_id)
    except WireError as refusal:
        await _refuse(websocket, service, refusal)


async def _refuse(websocket: WebSocket, service: Service, refusal: WireError) -> None:
    service.runtime.metrics.errors.labels(refusal.code).inc()
    service.refusals.tell("connection.refused", address(websocket), error_code=refusal.code)
    capacity = service.admission.capacity if isinstance(refusal, ServerAtCapacity) else None
    frame = encode(error_frame(refusal, capacity=capacity))
    try:
        if isinstance(refusal, GoingAway) and is_proxied(websocket):
            # A proxy can still ask another server, as long as no socket is open. A client gets the frame instead:
            # browsers are not shown the status of a handshake.
            wait = {"Retry-After": str(math.ceil((refusal.retry_after_ms or 0) / 1000))}
            await websocket.send_denial_response(Response(frame, 503, wait, media_type="application/json"))
            return
        await websocket.accept()
        await websocket.send_text(frame.decode())
        await websocket.close(refusal.close_code or ServerAtCapacity.close_code)
    except WebSocketDisconnect:
        pass  # the client left before the refusal
