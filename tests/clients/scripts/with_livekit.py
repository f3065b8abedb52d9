"""LiveKit Agents: a session with its OpenAI plugin, as a voice agent has it, with text in and out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from typing import Any

import told
from livekit.agents import Agent, AgentSession, APIConnectOptions, APIError, function_tool, llm
from livekit.plugins import openai
from told import BASE_URL, INSTRUCTIONS, KEY, LONG, MOST, OSLO, RESULT, SAID, ask, tell


def model(**options: Any) -> openai.LLM:
    return openai.LLM(model="chat", base_url=BASE_URL, api_key=KEY, **options)


class Companion(Agent):
    """Tells how many pieces came, and when the first of them is there."""

    def __init__(self, tools: Any = ()) -> None:
        super().__init__(instructions=INSTRUCTIONS, tools=list(tools))
        self.pieces: list[str] = []
        self.usage: llm.CompletionUsage | None = None
        self.enough = asyncio.Event()

    async def llm_node(self, *asked: Any) -> AsyncIterable[Any]:
        self.pieces.clear()
        async for chunk in Agent.default.llm_node(self, *asked):
            if isinstance(chunk, llm.ChatChunk):
                self.usage = chunk.usage or self.usage
                if chunk.delta and chunk.delta.content:
                    self.pieces.append(chunk.delta.content)
                    if len(self.pieces) >= 3:
                        self.enough.set()
            yield chunk


async def conversation() -> None:
    agent = Companion()
    async with AgentSession(llm=model(max_completion_tokens=MOST, user="user-1")) as session:
        await session.start(agent)
        for said in SAID:
            result = await session.run(user_input=said)
            message = result.expect.next_event().is_message(role="assistant").event().item
            assert agent.usage is not None
            tell(
                "turn",
                said=said,
                text=message.text_content,
                pieces=len(agent.pieces),
                finish="stop",
                cached=agent.usage.prompt_cached_tokens,
                usage=agent.usage.model_dump(),
            )


async def tool() -> None:
    @function_tool
    async def get_weather(place: str) -> str:
        """The weather of a place."""
        return RESULT

    async with AgentSession(llm=model(tool_choice="required", max_completion_tokens=MOST)) as session:
        await session.start(Companion([get_weather]))
        result = await session.run(user_input=ask(OSLO))
        call = result.expect.next_event().is_function_call(name="get_weather").event().item
        tell("calls", calls=[(call.call_id, call.name, call.arguments)], finish="tool_calls", text="")
        result.expect.next_event().is_function_call_output(output=RESULT)
        message = result.expect.next_event().is_message(role="assistant").event().item
        tell("turn", result=RESULT, text=message.text_content, finish="stop")


async def barge_in() -> None:
    agent = Companion()
    async with AgentSession(llm=model()) as session:
        await session.start(agent)
        speech = session.generate_reply(user_input=ask(LONG))
        await agent.enough.wait()
        await session.interrupt()
        await speech
        tell("closed", heard="".join(agent.pieces))
        await asyncio.to_thread(told.wait_for_test)
        result = await session.run(user_input=SAID[0])
        message = result.expect.next_event().is_message(role="assistant").event().item
        tell("turn", said=SAID[0], text=message.text_content, finish="stop")


async def failing() -> None:
    chat = llm.ChatContext()
    chat.add_message(role="user", content="hi")
    try:
        async with model() as found:
            await found.chat(chat_ctx=chat, conn_options=APIConnectOptions(max_retry=1, retry_interval=0.1)).collect()
    except APIError as error:
        told.tell_error(error)


if __name__ == "__main__":
    told.run(globals())
