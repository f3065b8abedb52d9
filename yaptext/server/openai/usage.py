"""The tokens of a turn as OpenAI's clients count them."""

from __future__ import annotations

from typing import NamedTuple

from yaptext.wire.frames import Done, Usage


class Tokens(NamedTuple):
    prompt: int
    cached: int
    completion: int
    reasoning: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def tokens_of(done: Done) -> Tokens:
    """Those of the reply; of the decision, if no reply was made."""
    usage = done.usage if isinstance(done.usage, Usage) else Usage()
    if not usage.prompt_tokens:
        return Tokens(usage.tool_prompt_tokens, usage.tool_cached_tokens, usage.tool_completion_tokens, 0)
    return Tokens(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.reasoning_tokens)
