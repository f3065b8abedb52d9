"""Pipecat: a pipeline with its OpenAI service between the two aggregators of a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import told
from loguru import logger
from pipecat.adapters.llm.schemas.function_schema import FunctionSchema
from pipecat.adapters.llm.schemas.tools_schema import ToolsSchema
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    InterruptionFrame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    LLMMessagesAppendFrame,
    LLMTextFrame,
    MetricsFrame,
)
from pipecat.metrics.metrics import LLMUsageMetricsData
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.tests.utils import run_test
from pipecat.turns.user_turn_strategies import ExternalUserTurnStrategies
from pipecat.workers.runner import WorkerRunner
from told import BASE_URL, INSTRUCTIONS, KEY, LONG, MOST, OSLO, RESULT, SAID, ask, tell

logger.remove()


def service(**settings: Any) -> OpenAILLMService:
    found = OpenAILLMService.Settings(model="chat", system_instruction=INSTRUCTIONS, **settings)
    return OpenAILLMService(base_url=BASE_URL, api_key=KEY, settings=found)


class Watch(BaseObserver):
    """What the service pushes."""

    def __init__(self, llm: OpenAILLMService) -> None:
        super().__init__()
        self._llm = llm
        self.pieces: list[str] = []
        self.usage: Any = None
        self.enough, self.over = asyncio.Event(), asyncio.Event()

    async def on_push_frame(self, data: FramePushed) -> None:
        if data.source is not self._llm:
            return
        if isinstance(data.frame, ErrorFrame):
            tell("failure", text=data.frame.error)
        if isinstance(data.frame, MetricsFrame):
            self.usage = next((d.value for d in data.frame.data if isinstance(d, LLMUsageMetricsData)), self.usage)
        if data.direction is not FrameDirection.DOWNSTREAM:
            return
        if isinstance(data.frame, LLMTextFrame):
            self.pieces.append(data.frame.text)
            if len(self.pieces) >= 3:
                self.enough.set()
        if isinstance(data.frame, LLMFullResponseEndFrame) and self.pieces:
            self.over.set()


async def talk(
    does: Callable[[PipelineWorker, Watch], Awaitable[None]], llm: OpenAILLMService, context: LLMContext
) -> None:
    # The default finds the end of a turn in audio, with a model of its own.
    text_only = LLMUserAggregatorParams(user_turn_strategies=ExternalUserTurnStrategies())
    pair = LLMContextAggregatorPair(context, user_params=text_only)
    watch = Watch(llm)
    worker = PipelineWorker(
        Pipeline([pair.user(), llm, pair.assistant()]),
        params=PipelineParams(enable_metrics=True, enable_usage_metrics=True),
        observers=[watch],
    )
    started = asyncio.Event()

    @worker.event_handler("on_pipeline_started")
    async def _started(worker: PipelineWorker, frame: Any) -> None:
        started.set()

    async def speak() -> None:
        await started.wait()
        await does(worker, watch)
        await worker.queue_frame(EndFrame())

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await asyncio.gather(runner.run(), speak())


async def say(worker: PipelineWorker, watch: Watch, text: str) -> str:
    """The whole reply."""
    watch.pieces.clear()
    watch.over.clear()
    await worker.queue_frame(LLMMessagesAppendFrame([{"role": "user", "content": text}], run_llm=True))
    await watch.over.wait()
    return "".join(watch.pieces)


async def conversation() -> None:
    async def two_turns(worker: PipelineWorker, watch: Watch) -> None:
        for said in SAID:
            text = await say(worker, watch, said)
            tell(
                "turn",
                said=said,
                text=text,
                pieces=len(watch.pieces),
                finish="stop",
                cached=watch.usage.cache_read_input_tokens,
                usage=watch.usage.model_dump(),
            )

    await talk(two_turns, service(max_completion_tokens=MOST), LLMContext())


async def tool() -> None:
    async def get_weather(asked: Any) -> None:
        call = (asked.tool_call_id, asked.function_name, told.json.dumps(dict(asked.arguments)))
        tell("calls", calls=[call], finish="tool_calls", text="")
        await asked.result_callback(RESULT)

    async def one_turn(worker: PipelineWorker, watch: Watch) -> None:
        text = await say(worker, watch, ask(OSLO))
        tell("turn", result=RESULT, text=text, finish="stop")

    llm = service(max_completion_tokens=MOST)
    llm.register_function("get_weather", get_weather)
    schema = FunctionSchema("get_weather", "The weather of a place.", {"place": {"type": "string"}}, ["place"])
    await talk(one_turn, llm, LLMContext(tools=ToolsSchema([schema]), tool_choice="required"))


async def barge_in() -> None:
    async def interrupted(worker: PipelineWorker, watch: Watch) -> None:
        await worker.queue_frame(LLMMessagesAppendFrame([{"role": "user", "content": ask(LONG)}], run_llm=True))
        await watch.enough.wait()
        await worker.queue_frame(InterruptionFrame())
        tell("closed", heard="".join(watch.pieces))
        await asyncio.to_thread(told.wait_for_test)
        tell("turn", said=SAID[0], text=await say(worker, watch, SAID[0]), finish="stop")

    await talk(interrupted, service(), LLMContext())


async def failing() -> None:
    """In Pipecat's own test harness: the error goes upstream."""
    context = LLMContext([{"role": "user", "content": "hi"}])
    _, up = await run_test(service(), frames_to_send=[LLMContextFrame(context)], start_timeout=20)
    (frame,) = [frame for frame in up if isinstance(frame, ErrorFrame)]
    assert frame.exception is not None
    told.tell_error(frame.exception)


if __name__ == "__main__":
    told.run(globals())
