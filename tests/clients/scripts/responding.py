"""What the scripts of the Responses API share."""

from __future__ import annotations

import json
from typing import Any

from told import BASE_URL, WEATHER, tell
from websockets.exceptions import InvalidStatus

TOOL: Any = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
SOCKET_URL = f"ws{BASE_URL[4:]}/responses"


def finish(response: Any) -> str:
    """As chat completions name it."""
    if response.status == "completed":
        return "tool_calls" if calls(response) else "stop"
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    return "length"


def calls(response: Any) -> list[tuple[str, str, str]]:
    return [(item.call_id, item.name, item.arguments) for item in response.output if item.type == "function_call"]


def used(response: Any) -> dict[str, Any]:
    return {"cached": response.usage.input_tokens_details.cached_tokens, "usage": response.usage.model_dump()}


class Refused(Exception):
    """An `error` event."""

    def __init__(self, event: Any) -> None:
        super().__init__(event.error.message)
        self.code = event.error.code
        tell("refused", status=event.status, code=self.code, headers=event.error.headers)


def tell_handshake(error: InvalidStatus) -> None:
    """One that was refused: the official client leaves it to `websockets`."""
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    answer = error.response
    code = json.loads(answer.body or b"")["error"]["code"]
    tell("error", kinds=kinds, text=str(error), code=code, wait=answer.headers.get("retry-after-ms"))
