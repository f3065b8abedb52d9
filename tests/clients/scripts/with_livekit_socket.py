"""LiveKit Agents with its plugin's Responses model on a socket, which is its default."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import told
import with_livekit
from livekit.agents import AgentSession, APIError
from livekit.agents.utils import http_context
from livekit.plugins import openai
from responding import SOCKET_URL
from told import KEY, SAID, tell
from with_livekit import Companion


def model(**options: Any) -> openai.responses.LLM:
    options.pop("max_completion_tokens", None)  # a reply that comes to a limit of its user is a failure to the plugin
    return openai.responses.LLM(model="chat", base_url=SOCKET_URL, api_key=KEY, **options)


async def closed(**options: Any) -> None:
    """Something happens between two turns; a turn that fails is tried once more by its user."""
    async with AgentSession(llm=model(**options)) as session:
        await session.start(Companion())
        for said in (*SAID, SAID[1]):
            try:
                result = await session.run(user_input=said)
            except APIError as error:
                told.tell_error(error.__cause__ if isinstance(error.__cause__, APIError) else error)
                continue
            text = result.expect.next_event().is_message(role="assistant").event().item.text_content
            tell("turn", said=said, text=text)
            if said == SAID[1]:
                return
            tell("idle")
            await asyncio.to_thread(told.wait_for_test)


def with_session(scenario: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """As a worker runs an agent: the plugin's socket is of the HTTP session that the worker opens."""

    async def run() -> None:
        async with http_context.open():
            await scenario()

    return run


with_livekit.model = model
SCENARIOS = {name: getattr(with_livekit, name) for name in ("conversation", "tool", "barge_in", "failing")}
SCENARIOS |= {"closed": closed, "closed_unstored": partial(closed, store=False)}
told.run({name: with_session(scenario) for name, scenario in SCENARIOS.items()})
