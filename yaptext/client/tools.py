"""Callables that answer the calls of a decision."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from yaptext.client.fields import Tools
from yaptext.wire.frames import IdentifiedCall, ToolResultItem

Callables = Mapping[str, Callable[..., Any]]


def split(tools: Tools | None) -> tuple[list[dict[str, Any]] | None, Callables]:
    """The schemas to send (None: the service's own tools), and the callables by name. The call of a tool with a
    callable is awaited, whatever its schema says."""
    if tools is None or isinstance(tools, Mapping):
        return None, tools or {}
    schemas: list[dict[str, Any]] = []
    callables: dict[str, Callable[..., Any]] = {}
    for tool in tools:
        if isinstance(tool, tuple):
            schema, call = tool
            callables[str(schema.get("function", schema).get("name"))] = call
            schemas.append({**schema, "await": True})
        else:
            schemas.append(dict(tool))
    return schemas, callables


async def results_of(calls: Sequence[IdentifiedCall], callables: Callables) -> list[ToolResultItem]:
    """All calls at once, in their order. A callable that is no coroutine function runs in a thread."""
    return list(await asyncio.gather(*(_result_of(call, callables) for call in calls)))


async def result_of(function: Callable[..., Any], **arguments: Any) -> Any:
    """What a function of the caller's returns. One that is no coroutine function runs in a thread."""
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    found = await asyncio.to_thread(function, **arguments)
    return await found if inspect.isawaitable(found) else found


async def _result_of(call: IdentifiedCall, callables: Callables) -> ToolResultItem:
    """What the callable returned; if it fails, the reason as a text for the model, without a traceback."""
    try:
        if call.name not in callables:
            raise LookupError(f"{call.name} is not available")
        content = await result_of(callables[call.name], **call.arguments)
        msgspec.json.encode(content)
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # it is not the tool that was cancelled
        content = f"error: {str(error) or type(error).__name__}"
    return ToolResultItem(id=call.id, content=content)
