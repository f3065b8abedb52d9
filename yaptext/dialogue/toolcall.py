"""The decision: does this utterance call a tool, and with which arguments.

The answer is constrained by a grammar to `[]` or a list of calls that are valid for the tools' schemas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from yaptext.dialogue.history import Message
from yaptext.dialogue.toolprompt import ToolPrompts
from yaptext.dialogue.toolset import ToolSet
from yaptext.engine.base import DECIDE, Engine, Sampling
from yaptext.errors import EngineFailed
from yaptext.wire.messages import Call


@dataclass(frozen=True, slots=True)
class Decision:
    """What the tool model said. `reason` is set where a fault or the timeout made it a no."""

    calls: list[Call]
    tool_ms: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reason: str | None = None


class Decider:
    """Asks the tool model. Whatever fails, the answer is a decision; only cancellation passes through."""

    def __init__(self, engine: Engine, tools: ToolSet, prompts: ToolPrompts, *, max_out: int, timeout_s: float) -> None:
        self._engine, self.tools, self._prompts = engine, tools, prompts
        self._max_out, self._timeout_s = max_out, timeout_s

    @classmethod
    async def open(
        cls, engine: Engine, tools: ToolSet, *, max_out: int, history_tokens: int, timeout_s: float
    ) -> Decider:
        prompts = await ToolPrompts.open(engine, history_tokens)
        return cls(engine, tools, prompts, max_out=max_out, timeout_s=timeout_s)

    async def prime(self) -> None:
        """Runs one throw-away decision, so that the fixed prompt and the grammar are warm."""
        prompt = await self._prompts.turn(self.tools, [], "Hello!")
        async with aclosing(self._engine.stream(prompt, self._sampling(self.tools), priority=DECIDE)) as deltas:
            async for _ in deltas:
                pass

    async def decide(self, tools: ToolSet, messages: Sequence[Message], utterance: str) -> Decision:
        """Decides within the hard timeout. A fault is a `no` with its reason."""
        begun = time.perf_counter()
        text, finish, prompt_tokens, cached = "", None, 0, 0
        calls: list[Call] = []
        reason = None
        try:
            async with asyncio.timeout(self._timeout_s):
                prompt = await self._prompts.turn(tools, messages, utterance)
                stream = self._engine.stream(prompt, self._sampling(tools), priority=DECIDE)
                async with aclosing(stream) as deltas:
                    async for delta in deltas:
                        text += delta.text
                        prompt_tokens, cached = delta.prompt_tokens, delta.cached_tokens
                        finish = delta.finish_reason
            calls = tools.parse(text) if finish == "stop" else []
            reason = None if finish == "stop" else "truncated"
        except TimeoutError:
            reason = "timeout"
        except EngineFailed:
            reason = "engine_failed"
        except ValueError:
            reason = "invalid"
        tool_ms = (time.perf_counter() - begun) * 1000
        return Decision(calls, tool_ms, prompt_tokens, cached, reason)

    def _sampling(self, tools: ToolSet) -> Sampling:
        return Sampling(max_tokens=self._max_out, json_schema=tools.schema)
