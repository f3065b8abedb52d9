"""The official client, asynchronous: responses over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import told
from openai import AsyncOpenAI, OpenAIError
from responding import TOOL, calls, finish, used
from told import INSTRUCTIONS, LONG, MOST, OSLO, RESULT, SAID, ask, tell

ASKED: dict[str, Any] = {"model": "chat", "instructions": INSTRUCTIONS}


async def conversation() -> None:
    """The second turn has the whole history, and nothing is stored."""
    given: list[Any] = []
    async with AsyncOpenAI() as client:
        for said in SAID:
            given.append({"role": "user", "content": said})
            pieces, response = [], None
            asked: Any = {**ASKED, "input": given, "max_output_tokens": MOST, "store": False}
            async with await client.responses.create(**asked, stream=True) as stream:
                async for event in stream:
                    if event.type == "response.output_text.delta":
                        pieces.append(event.delta)
                    elif event.type in ("response.completed", "response.incomplete"):
                        response = event.response
            assert response is not None and response.output_text == "".join(pieces)
            text, ended = response.output_text, finish(response)
            tell("turn", said=said, text=text, pieces=len(pieces), finish=ended, **used(response))
            given += response.output


async def tool() -> None:
    async with AsyncOpenAI() as client:
        asked: Any = {**ASKED, "tools": [TOOL], "max_output_tokens": MOST}
        first = await client.responses.create(
            **asked, input=ask(OSLO), tool_choice="required", parallel_tool_calls=False
        )
        tell("calls", calls=calls(first), finish=finish(first), text=first.output_text)
        ((call, _, _),) = calls(first)
        given: Any = [{"type": "function_call_output", "call_id": call, "output": RESULT}]
        response = await client.responses.create(**asked, input=given, previous_response_id=first.id)
        tell("turn", result=RESULT, text=response.output_text, finish=finish(response))


async def barge_in() -> None:
    """The reading task is cancelled."""
    heard: list[str] = []
    enough = asyncio.Event()

    async def read(client: AsyncOpenAI) -> None:
        async with client.responses.stream(**ASKED, input=ask(LONG)) as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    heard.append(event.delta)
                    if len("".join(heard).split()) >= 3:
                        enough.set()

    async with AsyncOpenAI() as client:
        reading = asyncio.create_task(read(client))
        await enough.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        tell("closed", heard="".join(heard))
        await asyncio.to_thread(told.wait_for_test)
        response = await client.responses.create(**ASKED, input=SAID[0], max_output_tokens=MOST)
        tell("turn", said=SAID[0], text=response.output_text, finish=finish(response))


async def failing() -> None:
    try:
        async with AsyncOpenAI(max_retries=1) as client:
            await client.responses.create(model="chat", input="hi")
    except OpenAIError as error:
        told.tell_error(error)


told.run(globals())
