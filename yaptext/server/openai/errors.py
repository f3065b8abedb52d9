"""Errors in the form that OpenAI's clients act on: status, type, time of the next try."""

from __future__ import annotations

import math
from typing import Any

from yaptext.wire.frames import Error

_FORMS = {
    "authentication_failed": (401, "invalid_request_error", "invalid_api_key"),
    "bad_message": (400, "invalid_request_error", "invalid_value"),
    "text_too_long": (400, "invalid_request_error", "context_length_exceeded"),
    "unknown_persona": (404, "invalid_request_error", "model_not_found"),
    "not_deployed": (404, "invalid_request_error", "model_not_found"),
    "rate_limited": (429, "rate_limit_error", "rate_limit_exceeded"),
    "server_at_capacity": (503, "server_error", "server_at_capacity"),
    "going_away": (503, "server_error", "going_away"),
    "slow_client": (503, "server_error", "slow_client"),
    "engine_failed": (500, "server_error", "engine_failed"),
    "internal": (500, "server_error", "internal"),
}
"""By code of the wire. Clients retry 429 and 5xx by themselves; after a 400 or 404 Pipecat gives the service up."""


_BY_PLACE = {"previous_response_id": "previous_response_not_found"}
"""Pipecat sends the whole conversation then."""


def status_of(error: Error) -> int:
    return _FORMS[error.error_code][0]


def body_of(error: Error) -> dict[str, Any]:
    _, kind, code = _FORMS[error.error_code]
    message, _, place = error.message.partition(" - at $.")
    code = _BY_PLACE.get(place, code)
    return {"error": {"message": message, "type": kind, "param": place or None, "code": code}}


def headers_of(error: Error) -> dict[str, str]:
    if not isinstance(error.retry_after_ms, int):
        return {}
    return {"retry-after-ms": str(error.retry_after_ms), "retry-after": str(math.ceil(error.retry_after_ms / 1000))}
