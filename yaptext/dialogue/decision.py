"""The decision: whether an utterance calls a tool, with its arguments.

The answer is constrained by a grammar to `[]` or a list of calls that are valid for the tools' schemas. It counts as
soon as it is whole: a no costs the one or two tokens of `[]`, a yes its call, without the token after it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from yaptext.dialogue.tool_prompt import Head, ToolPrompts
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import Message
from yaptext.engine.base import DECIDE, Delta, Engine, Sampling
from yaptext.errors import EngineFailed
from yaptext.wire.frames import Call

_ALTERNATIVES = 8
"""The grammar leaves few ways to begin: `[`, `[]`, `[{` and the like. Asked for under a threshold alone: on an H200
32 decisions at once took 116 ms (p50) with them, and 27 in a build before them (fp8 weights instead of AWQ)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the tool model said. `p` is the probability it gave to a call, where a threshold asks for it; `reason`
    is set where a fault or the timeout made it a no."""

    calls: list[Call]
    tool_ms: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    p: float | None = None
    reason: str | None = None


class Decider:
    """Asks the tool model. Whatever fails, the answer is a decision; only cancellation passes through."""

    def __init__(
        self,
        engine: Engine,
        tools: ToolSet,
        *,
        max_out: int,
        history_tokens: int,
        timeout_s: float,
        threshold: float | None = None,
    ) -> None:
        """`threshold` is the probability from which on a decision is yes; None leaves it to the model's best guess."""
        self._engine, self.tools, self.prompts = engine, tools, ToolPrompts(engine.codec, history_tokens)
        self._max_out, self._timeout_s, self.threshold = max_out, timeout_s, threshold
        self.history_tokens = history_tokens
        self._begun = 0

    async def head(self) -> Head:
        """The fixed beginning of decisions about the service's own tools."""
        return await self.prompts.head(self.tools)

    async def prime(self, batches: Sequence[int] = (1,)) -> None:
        """Runs throw-away decisions, so many at once, so that the fixed prompt, the grammar and the kernels of each
        batch are warm."""
        prompt = await self.prompts.turn(self.tools, [], "Hello!")
        for size in batches:
            asked = (self._ask(_Answer(self.tools), self.tools, prompt, self.tools.schema) for _ in range(size))
            for answer in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(answer, BaseException) and not isinstance(answer, ValueError):
                    raise answer  # not the model's answer: nothing waits for it
        self._begun = self._engine.load().begun

    async def prefix(self, tools: ToolSet, messages: Sequence[Message]) -> list[int]:
        """What the next decision's prompt begins with."""
        return await self.prompts.prefix(tools, messages)

    async def refresh(self) -> None:
        """Computes the fixed prompt again where others were computed since (they may have taken its place in the cache)
        and nothing runs now."""
        load = self._engine.load()
        if load.running == 0 and load.begun != self._begun:
            await self.prime()

    async def decide(
        self,
        tools: ToolSet,
        messages: Sequence[Message],
        utterance: str,
        results: Sequence[str] = (),
        *,
        must_call: bool = False,
    ) -> Decision:
        """Decides within the hard timeout, with `must_call` only which call; `results` are of calls that were made for
        this utterance. A fault is a `no` with its reason."""
        begun = time.perf_counter()
        answer = _Answer(tools, None if must_call else self.threshold)
        reason = None
        try:
            async with asyncio.timeout(self._timeout_s):
                prompt = await self.prompts.turn(tools, messages, utterance, results)
                await self._ask(answer, tools, prompt, tools.call_schema if must_call else tools.schema)
                if answer.overruled:
                    # The model's best guess was no, the threshold says yes: which call, without that choice.
                    answer = _Answer(tools, p=answer.p)
                    await self._ask(answer, tools, prompt, tools.call_schema)
            if answer.calls is None:
                reason = "truncated"
        except TimeoutError:
            reason = "timeout"
        except EngineFailed:
            reason = "engine_failed"
        except ValueError:
            reason = "invalid"
        calls = answer.calls if answer.calls and reason is None else []
        tool_ms = (time.perf_counter() - begun) * 1000
        counts = answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens
        return Decision(calls, tool_ms, *counts, answer.p, reason)

    async def _ask(self, answer: _Answer, tools: ToolSet, prompt: Sequence[int], schema: str) -> None:
        """Streams until the answer is whole. Raises `ValueError` where what came is none."""
        alternatives = 0 if self.threshold is None else _ALTERNATIVES
        layout = (await self.prompts.head(tools)).layout
        stop_ids = tuple(sorted({*layout.stop_ids, *self._engine.codec.end_ids}))
        sampling = Sampling(max_tokens=self._max_out, stop_ids=stop_ids, json_schema=schema, alternatives=alternatives)
        async with aclosing(self._engine.stream(prompt, sampling, priority=DECIDE)) as deltas:
            async for delta in deltas:
                answer.take(delta)
                if answer.calls is not None:
                    return


class NoDecider:
    """Stands in for a tool engine that could not start (`TOOL_OPTIONAL`)."""

    history_tokens = 0

    def __init__(self, tools: ToolSet) -> None:
        self.tools = tools

    async def prime(self, batches: Sequence[int] = ()) -> None:
        pass

    async def refresh(self) -> None:
        pass

    async def prefix(self, tools: ToolSet, messages: Sequence[Message]) -> list[int]:
        return []

    async def decide(
        self,
        tools: ToolSet,
        messages: Sequence[Message],
        utterance: str,
        results: Sequence[str] = (),
        *,
        must_call: bool = False,
    ) -> Decision:
        return Decision([], 0.0, reason="not_available")


class _Answer:
    """An answer as it comes. `calls` is None until it is whole; `overruled` says that the threshold wants a call where
    the model said no."""

    def __init__(self, tools: ToolSet, threshold: float | None = None, p: float | None = None) -> None:
        self._tools, self.threshold, self.p = tools, threshold, p
        self._text = ""
        self._path, self._yes, self._no = 1.0, 0.0, 0.0
        self.calls: list[Call] | None = None
        self.overruled = False
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0

    def take(self, delta: Delta) -> None:
        self.prompt_tokens, self.cached_tokens = delta.prompt_tokens, delta.cached_tokens
        self.completion_tokens += delta.tokens
        if self.p is None and delta.alternatives:
            self._weigh(delta)
        self._text += delta.text
        if self.p is not None and self.threshold is not None and (said := _said(self._text)) is not None:
            wanted, self.threshold = self.p >= self.threshold, None
            self.overruled = wanted and not said
            if said and not wanted:
                self.calls = []
                return
        text = self._text.strip()
        if delta.finish_reason == "stop":
            self.calls = self._tools.parse(text)
        elif text == "[]":
            self.calls = []
        elif text.endswith("}]"):
            with suppress(ValueError):  # a list inside a call ended there
                self.calls = self._tools.parse(text)

    def _weigh(self, delta: Delta) -> None:
        """Adds up the possible continuations, until one of them says yes or no."""
        if delta.tokens != 1:
            self._path = 0.0  # two tokens at once: what would have followed the other ways is not told
        for text, probability in delta.alternatives[0].items():
            said = _said(self._text + text)
            if said is True:
                self._yes += self._path * probability
            elif said is False:
                self._no += self._path * probability
        self._path *= delta.alternatives[0].get(delta.text, 0.0)
        if _said(self._text + delta.text) is not None and self._yes + self._no > 0:
            self.p = self._yes / (self._yes + self._no)


def _said(text: str) -> bool | None:
    """What the beginning of an answer says: yes, no, or nothing yet."""
    text = text.strip()
    if text.startswith("[]"):
        return False
    return True if len(text) > 1 else None
