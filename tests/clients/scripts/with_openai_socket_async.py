"""The official client, asynchronous: responses on a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import told
from openai import AsyncOpenAI
from responding import TOOL, Refused, calls, finish, tell_handshake, used
from told import INSTRUCTIONS, LONG, MOST, OSLO, RESULT, SAID, ask, tell
from websockets.exceptions import InvalidStatus

ASKED: dict[str, Any] = {"model": "chat", "instructions": INSTRUCTIONS}


async def read(events: Any) -> tuple[Any, list[str]]:
    """The next response, and its text as it came."""
    pieces: list[str] = []
    async for event in events:
        if event.type == "response.output_text.delta":
            pieces.append(event.delta)
        elif event.type in ("response.completed", "response.incomplete"):
            return event.response, pieces
        elif event.type == "error":
            raise Refused(event)
    raise RuntimeError("The socket closed.")


async def turn(connection: Any, said: Any, *, events: Any = None, **asked: Any) -> Any:
    await connection.response.create(**ASKED, input=said, **asked)
    response, pieces = await read(events or connection)
    assert response.output_text == "".join(pieces)
    text, ended = response.output_text, finish(response)
    tell("turn", said=said, text=text, pieces=len(pieces), finish=ended, **used(response))
    return response


async def conversation() -> None:
    """Each turn after the first is its user's words alone. Nothing is stored."""
    async with AsyncOpenAI() as client, client.responses.connect() as connection:
        first = await turn(connection, SAID[0], max_output_tokens=MOST, store=False)
        await turn(connection, SAID[1], max_output_tokens=MOST, store=False, previous_response_id=first.id)


async def tool() -> None:
    async with AsyncOpenAI() as client, client.responses.connect() as connection:
        asked: Any = {**ASKED, "tools": [TOOL]}
        await connection.response.create(**asked, input=ask(OSLO), tool_choice="required")
        first, _ = await read(connection)
        tell("calls", calls=calls(first), finish=finish(first), text=first.output_text)
        given: list[Any] = [{"role": "user", "content": OSLO}, *first.output]
        for call, _, _ in calls(first):
            given.append({"type": "function_call_output", "call_id": call, "output": RESULT})
        await connection.response.create(**asked, input=[_plain(item) for item in given])
        response, _ = await read(connection)
        tell("turn", result=RESULT, text=response.output_text, finish=finish(response))


def _plain(item: Any) -> Any:
    return item if isinstance(item, dict) else item.model_dump(exclude_none=True)


async def barge_in() -> None:
    """The task that reads is cancelled, which closes the socket."""
    heard: list[str] = []
    enough = asyncio.Event()

    async def listen(client: AsyncOpenAI) -> None:
        async with client.responses.connect() as connection:
            await connection.response.create(**ASKED, input=ask(LONG))
            async for event in connection:
                if event.type == "response.output_text.delta":
                    heard.append(event.delta)
                    if len("".join(heard).split()) >= 3:
                        enough.set()

    async with AsyncOpenAI() as client:
        listening = asyncio.create_task(listen(client))
        await enough.wait()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        tell("closed", heard="".join(heard))
        await asyncio.to_thread(told.wait_for_test)
        async with client.responses.connect() as connection:
            await turn(connection, SAID[0], max_output_tokens=MOST)


async def closed() -> None:
    """Something happens between two turns, and a task reads all the time: the client connects again by itself, if it
    has a callback."""

    def reconnecting(event: Any) -> None:
        tell("reconnecting", code=event.close_code, attempt=event.attempt)

    events: asyncio.Queue[Any] = asyncio.Queue()

    async def listen(connection: Any) -> None:
        async for event in connection:
            events.put_nowait(event)

    async with AsyncOpenAI() as client, client.responses.connect(on_reconnecting=reconnecting) as connection:
        listening = asyncio.create_task(listen(connection))
        first = await turn(connection, SAID[0], events=_each(events))
        tell("idle")
        await asyncio.to_thread(told.wait_for_test)
        try:
            await turn(connection, SAID[1], events=_each(events), previous_response_id=first.id)
        except Refused as error:
            if error.code == "previous_response_not_found":
                talk: Any = [{"role": "user", "content": SAID[0]}, *first.output, {"role": "user", "content": SAID[1]}]
                await turn(connection, [_plain(item) for item in talk], events=_each(events))
    await listening


async def _each(events: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while True:
        yield await events.get()


async def failing() -> None:
    try:
        async with AsyncOpenAI() as client, client.responses.connect() as connection:
            await turn(connection, SAID[0])
    except InvalidStatus as error:
        tell_handshake(error)


told.run(globals())
