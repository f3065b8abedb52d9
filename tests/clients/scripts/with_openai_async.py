"""The official client, asynchronous: a barge-in is the cancellation of the task that reads the stream."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import told
from openai import AsyncOpenAI, OpenAIError
from told import INSTRUCTIONS, LONG, MOST, OSLO, RESULT, SAID, WEATHER, ask, tell

MESSAGES: list[Any] = [{"role": "system", "content": INSTRUCTIONS}]


async def models() -> None:
    async with AsyncOpenAI() as client:
        tell("models", ids=[model.id async for model in client.models.list()])


async def conversation() -> None:
    async with AsyncOpenAI() as client:
        for said in SAID:
            MESSAGES.append({"role": "user", "content": said})
            asked: Any = {"model": "chat", "messages": MESSAGES, "max_completion_tokens": MOST}
            pieces = 0
            async with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
                async for event in stream:
                    pieces += event.type == "content.delta"
                final = await stream.get_final_completion()
            (choice,), usage = final.choices, final.usage
            cached = usage.prompt_tokens_details.cached_tokens
            tell(
                "turn",
                said=said,
                text=choice.message.content,
                pieces=pieces,
                finish=choice.finish_reason,
                cached=cached,
                usage=usage.model_dump(),
            )
            MESSAGES.append({"role": "assistant", "content": choice.message.content})


async def tool() -> None:
    async with AsyncOpenAI() as client:
        MESSAGES.append({"role": "user", "content": ask(OSLO)})
        asked: Any = {"model": "chat", "messages": MESSAGES, "tools": [WEATHER], "max_tokens": MOST}
        first = await client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False)
        message = first.choices[0].message
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
        tell("calls", calls=calls, finish=first.choices[0].finish_reason, text=message.content)
        MESSAGES.append(message)  # as the client's own guide does
        MESSAGES.extend({"role": "tool", "tool_call_id": call[0], "content": RESULT} for call in calls)
        said = await client.chat.completions.create(**asked)
        tell("turn", result=RESULT, text=said.choices[0].message.content, finish=said.choices[0].finish_reason)


async def barge_in() -> None:
    heard: list[str] = []
    enough = asyncio.Event()

    async def read(client: AsyncOpenAI) -> None:
        MESSAGES.append({"role": "user", "content": ask(LONG)})
        async with await client.chat.completions.create(model="chat", messages=MESSAGES, stream=True) as stream:
            async for chunk in stream:
                heard.append(chunk.choices[0].delta.content or "")
                if len(heard) > 3:
                    enough.set()

    async with AsyncOpenAI() as client:
        reading = asyncio.create_task(read(client))
        await enough.wait()
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        tell("closed", heard="".join(heard))
        await asyncio.to_thread(told.wait_for_test)
        MESSAGES.extend([{"role": "assistant", "content": "".join(heard)}, {"role": "user", "content": SAID[0]}])
        said = await client.chat.completions.create(model="chat", messages=MESSAGES, max_tokens=MOST)
        tell("turn", said=SAID[0], text=said.choices[0].message.content, finish=said.choices[0].finish_reason)


async def failing() -> None:
    async with AsyncOpenAI(max_retries=1) as client:
        try:
            await client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "hi"}])
        except OpenAIError as error:
            told.tell_error(error)


told.run(globals())
