"""The answer of a turn: its decision with its reply, one after the other or at once."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from msgspec import UNSET

from yaptext.dialogue import sampling as samplings
from yaptext.dialogue.chat_prompt import Around
from yaptext.dialogue.decision import Decision
from yaptext.dialogue.outgoing import Reply, Sink
from yaptext.dialogue.reply import Lines, Sentences, within
from yaptext.dialogue.request import TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.dialogue.talk import Called
from yaptext.dialogue.tool_rounds import Asked, in_words, returned
from yaptext.dialogue.tools import ToolSet
from yaptext.engine.base import Delta, Sampling
from yaptext.errors import EngineFailed, TextTooLong, WireError
from yaptext.wire.frames import IdentifiedCall, Timings, ToolCall, Usage

_TOOL_ONLY_MESSAGES = 16


class Answer:
    """What is computed for one turn, and what came of it so far."""

    def __init__(self, runtime: Runtime, session: Session, request: TurnRequest) -> None:
        """Nothing of the session changes. Raises `BadMessage`, `TextTooLong`."""
        self.received_at = time.perf_counter()
        self._runtime, self._session, self._request = runtime, session, request
        self.asked: Asked | None = None
        """The exchange that the turn continues, if it brings results of tools."""
        self.rounds: list[list[Called]] = [list(calls) for calls in request.rounds]
        self.utterance, self.note = request.utterance, request.note
        settings = runtime.settings
        self.speakable = settings.speakable if request.speakable is None else request.speakable
        self._awaits = settings.await_tools if request.await_tools is None else request.await_tools
        if request.results is not None:
            self.asked, last = session.asked, returned(request.results, session.asked, settings.tool_result_max_tokens)
        if self.asked is not None:
            self.rounds = [*self.asked.before, last]
            self.utterance, self.note = self.asked.utterance, self.asked.note
            self.speakable, self._awaits = self.asked.speakable, True
        self._prompts = runtime.plain_prompts if request.plain else runtime.prompts
        self.usage, self.timings = Usage(), Timings()
        self.sent: str | None = None
        """The utterance as it stood in the prompt."""
        self.finish_reason: str | None = None
        self.alternatives: list[dict[str, float]] = []
        """Of each token of the reply, itself first, if the request wants them."""
        self.decision: Decision | None = None
        self.calls: list[IdentifiedCall] = []
        self.ends_with_calls = False
        """The client runs them, and its next turn continues with their results."""

    def open(self, sink: Sink, number: int) -> None:
        """Before `run`: the persona and the tools are those of the session from here on."""
        self._sink, self.number = sink, number
        self.tokens = sink.tokens(number)
        self.reply = Reply(self.tokens, speakable=self.speakable)
        self._persona = self._runtime.persona(self._session)
        self._tools = self._session.tools or (self._runtime.decider.tools if self._runtime.decider else None)

    @property
    def seed(self) -> int:
        given = self._request.sampling
        return self._session.seed + self.number if given is None or given.seed is None else given.seed

    async def run(self) -> None:
        """From the ack to the last token. Raises `EngineFailed`, `TextTooLong`."""
        await asyncio.sleep(0)  # others' turn: a long history was parsed
        if self.utterance is not None:
            self.utterance = await self._runtime.utterance(self.utterance)
        if self._prompts is None or not self._request.replies:
            await self._decide()
            del self._session.transcript.messages[:-_TOOL_ONLY_MESSAGES]  # no chat prompt trims them
        elif self._runtime.decider is None or not self._request.decides:
            await self._chat()
        elif self._runtime.settings.concurrent_model_call:
            await self._both_at_once()
        else:
            await self._decide()
            if not self.ends_with_calls:
                await self._chat()

    async def _both_at_once(self) -> None:
        """Chat text is held until the decision is out; then the same stream continues."""
        self.reply.hold()
        failure: WireError | None = None
        async with asyncio.TaskGroup() as group:
            deciding = group.create_task(self._decide())
            chatting = asyncio.ensure_future(self._chat())
            deciding.add_done_callback(lambda _: chatting.cancel() if self.ends_with_calls else None)
            try:
                await chatting
            except (EngineFailed, TextTooLong) as error:
                failure = error  # the decision still reaches the client, before the error
            except asyncio.CancelledError:
                chatting.cancel()
                if not self.ends_with_calls or self.reply.closed:
                    raise
        if failure is not None and not self.ends_with_calls:
            raise failure

    async def _decide(self) -> None:
        decider, tools = self._runtime.decider, self._tools
        assert decider is not None and tools is not None
        self._mark_queue()
        rounds = self.asked.rounds if self.asked is not None else 0
        decision = Decision([], 0.0)
        if tools.names and self.utterance is not None and rounds < self._runtime.settings.max_tool_rounds:
            messages = self._session.transcript.messages
            must, results = self._request.must_call, in_words(self.rounds)
            decision = await decider.decide(tools, messages, self.utterance, results, must_call=must)
            if self.asked is not None:
                decision = replace(decision, calls=self.asked.new(decision.calls))
        if not self.reply.closed:  # else the turn was cut in the moment in which the decision came
            self._release(decision, tools)

    def _release(self, decision: Decision, tools: ToolSet) -> None:
        """Sends the decision, then the chat text that waited for it: one step, nothing comes between."""
        self.decision = decision
        self.ends_with_calls = any(self._awaits or call.name in tools.awaited for call in decision.calls)
        self._runtime.metrics.decisions.labels(decision.reason or ("yes" if decision.calls else "no")).inc()
        self.usage.tool_prompt_tokens = decision.prompt_tokens
        self.usage.tool_cached_tokens = decision.cached_tokens
        self.usage.tool_completion_tokens = decision.completion_tokens
        self.timings.tool_ms = round(decision.tool_ms, 2)
        self.calls = [IdentifiedCall(f"call_{secrets.token_hex(6)}", c.name, c.arguments) for c in decision.calls]
        self._sink.send(
            ToolCall(
                status="yes" if decision.calls else "no",
                raw=self.calls,
                turn=self.number,
                tool_ms=self.timings.tool_ms,
                p=UNSET if decision.p is None else round(decision.p, 4),
                reason=decision.reason or UNSET,
            )
        )
        if self._runtime.observer is not None:
            self._runtime.observer.decided(self)
        if not self.ends_with_calls:
            self.reply.release()

    async def _chat(self) -> None:
        if self.reply.closed:
            return  # cut while it was decided, by a tool engine that failed in letting go
        runtime, prompts, engine = self._runtime, self._prompts, self._runtime.engines.chat
        assert prompts is not None and engine is not None
        now = None if prompts.plain else runtime.now()
        if self.rounds:
            last = self.rounds[-1]
            last[:] = [replace(call, content=await runtime.tool_result(call.content)) for call in last]
        around = Around(self.note, in_words(self.rounds), self.rounds)
        prompt = await prompts.turn(self._persona, self._session.transcript.messages, self.utterance, now, around)
        if self.utterance is not None:
            self.sent = prompts.sent(self.utterance, now)
        room = engine.codec.max_model_len - len(prompt)
        if room < 1:
            raise TextTooLong(f"the prompt is {len(prompt)} tokens; limit is {engine.codec.max_model_len - 1}")
        sampling = samplings.sampling(runtime, self._request.sampling, self.seed, room, self._session.key_name)
        if self._request.json_schema is not None:
            sampling = replace(sampling, json_schema=self._request.json_schema)
        if self._request.alternatives:
            sampling = replace(sampling, alternatives=self._request.alternatives)
        self._mark_queue()
        try:
            async with (
                asyncio.timeout(runtime.settings.chat_timeout_s or None),
                aclosing(engine.stream(prompt, sampling)) as deltas,
            ):
                await self._take(deltas, sampling)
        except TimeoutError:
            self.finish_reason = "timeout"

    async def _take(self, deltas: AsyncIterator[Delta], sampling: Sampling) -> None:
        """Passes the reply on, up to its end: the engine's, a label of the next speaker, or a limit."""
        runtime, usage, reply = self._runtime, self.usage, self.reply
        assert self._prompts is not None
        given = self._request.sampling
        most, thinks = samplings.reply_tokens(runtime, given), sampling.reasoning is not None
        lines = Lines() if self._prompts.labelled else None
        soft = samplings.soft_limit(runtime, given)
        sentences = None if soft is None else Sentences(soft)
        async for delta in deltas:
            usage.prompt_tokens, usage.cached_tokens = delta.prompt_tokens, delta.cached_tokens
            usage.completion_tokens += delta.tokens
            if thinks:
                usage.reasoning_tokens += delta.reasoning
            self.finish_reason = delta.finish_reason
            if sampling.alternatives:
                self._keep(delta)
            told = delta
            if lines is not None and (lines.waiting or "\n" in delta.text):  # seldom: this is done for every token
                told = within(lines, delta)
            if sentences is not None and sentences.ends(told):
                self.finish_reason = "soft_limit"
                return
            reply.take(told)
            if lines is not None and lines.over:
                self.finish_reason = "stop"
                return
            if thinks and usage.completion_tokens - usage.reasoning_tokens >= most:
                self.finish_reason = self.finish_reason or "length"
                return

    def _keep(self, delta: Delta) -> None:
        self.alternatives += delta.alternatives
        if delta.finish_reason == "stop" and self.alternatives:
            last = next(iter(self.alternatives[-1]), "")
            if not (last and delta.text.endswith(last)):  # the token that ends a reply is none of its text
                del self.alternatives[-1]

    def _mark_queue(self) -> None:
        if self.timings.queue_ms is None:
            self.timings.queue_ms = self._ms_until(time.perf_counter())

    def mark_end(self) -> None:
        """Notes when the turn was over; the first call counts."""
        if self.timings.total_ms is None:
            self.timings.total_ms = self._ms_until(time.perf_counter())
            if self.reply.first_at is not None:
                self.timings.ttft_ms = self._ms_until(self.reply.first_at)

    def _ms_until(self, at: float) -> float:
        return round((at - self.received_at) * 1000, 2)
