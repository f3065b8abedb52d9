"""Pipecat: `OpenAIResponsesLLMService`, which holds a socket, in the same pipeline."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import told
import with_pipecat
from pipecat.frames.frames import ErrorFrame, InterruptionFrame, LLMFullResponseEndFrame, LLMMessagesAppendFrame
from pipecat.observers.base_observer import FramePushed
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.services.openai.responses.llm import OpenAIResponsesLLMService
from responding import SOCKET_URL
from told import BASE_URL, INSTRUCTIONS, KEY, LONG, SAID, tell
from with_pipecat import say, talk


def service(**settings: Any) -> OpenAIResponsesLLMService:
    settings.pop("max_completion_tokens", None)  # the service reports a reply that comes to this limit as an error
    found = OpenAIResponsesLLMService.Settings(model="chat", system_instruction=INSTRUCTIONS, **settings)
    return OpenAIResponsesLLMService(ws_url=SOCKET_URL, base_url=BASE_URL, api_key=KEY, settings=found)


class Watch(with_pipecat.Watch):
    """A turn is over, whatever it brought."""

    async def on_push_frame(self, data: FramePushed) -> None:
        await super().on_push_frame(data)
        if data.source is self._llm and isinstance(data.frame, ErrorFrame) and data.frame.exception is not None:
            told.tell_error(data.frame.exception)
        if data.source is self._llm and isinstance(data.frame, LLMFullResponseEndFrame):
            self.over.set()


async def tool() -> None:
    """The service does not send the context's `tool_choice`."""
    with_pipecat.service = partial(service, extra={"tool_choice": "required"})
    await with_pipecat.tool()


async def barge_in_early() -> None:
    """Before the first event of the second reply; then the user speaks again."""

    async def turns(worker: PipelineWorker, watch: with_pipecat.Watch) -> None:
        tell("turn", said=SAID[0], text=await say(worker, watch, SAID[0]))
        tell("idle")
        await asyncio.to_thread(told.wait_for_test)
        await worker.queue_frame(LLMMessagesAppendFrame([{"role": "user", "content": LONG}], run_llm=True))
        await asyncio.to_thread(told.wait_for_test)
        await worker.queue_frame(InterruptionFrame())
        tell("closed")
        await asyncio.to_thread(told.wait_for_test)
        tell("turn", said=SAID[1], text=await say(worker, watch, SAID[1]))

    await talk(turns, service(), LLMContext())


async def closed() -> None:
    """Something happens between two turns; a turn that brings nothing is tried once more by its user."""

    async def turns(worker: PipelineWorker, watch: with_pipecat.Watch) -> None:
        tell("turn", said=SAID[0], text=await say(worker, watch, SAID[0]))
        tell("idle")
        await asyncio.to_thread(told.wait_for_test)
        for _ in range(2):
            text = await say(worker, watch, SAID[1])
            tell("turn", said=SAID[1], text=text)
            if text:
                return

    with_pipecat.Watch = Watch
    await talk(turns, service(), LLMContext())


async def failing() -> None:
    """A turn that brings nothing is tried once more by its user."""

    async def turns(worker: PipelineWorker, watch: with_pipecat.Watch) -> None:
        tell("asking")
        for _ in range(2):
            text = await say(worker, watch, SAID[0])
            tell("turn", said=SAID[0], text=text)
            if text:
                return

    with_pipecat.Watch = Watch
    await talk(turns, service(), LLMContext())


async def inference() -> None:
    """Beside the conversation, as Pipecat asks for a summary of it: over HTTP."""
    tell("turn", said=SAID[0], text=await service().run_inference(LLMContext([{"role": "user", "content": SAID[0]}])))


with_pipecat.service = service
OWN = {"tool": tool, "barge_in_early": barge_in_early, "closed": closed, "failing": failing, "inference": inference}
told.run(vars(with_pipecat) | OWN)
