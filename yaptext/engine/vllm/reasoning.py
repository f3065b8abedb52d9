"""Thinking kept apart from speech, by vLLM's own parsers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser

from yaptext.engine.base import Reasoning
from yaptext.errors import StartRefused


class Thoughts:
    """The thinking in one reply. Raises `StartError` for a parser that does not exist or does not fit the tokenizer."""

    def __init__(self, reasoning: Reasoning, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        try:
            self._parser: ReasoningParser = _parser_of(reasoning)(tokenizer)
            self._parser.adjust_initial_state_from_prompt(list(prompt))
        except Exception as error:  # each parser raises its own
            raise StartRefused(f"{str(error) or type(error).__name__} (REASONING_PARSER)") from error
        self._text, self._ids = "", list[int]()
        self._spoke = False

    def take(self, text: str, ids: Sequence[int]) -> tuple[str, int]:
        """The spoken part of a delta, and how many of its tokens are thinking."""
        before, self._text = self._text, self._text + text
        earlier, self._ids = self._ids, [*self._ids, *ids]
        message = self._parser.extract_reasoning_streaming(before, self._text, text, earlier, self._ids, list(ids))
        spoken = (message.content or "") if message is not None else ""
        half_character = self._spoke and not text
        return self._said(spoken), 0 if spoken or half_character else len(ids)

    def rest(self) -> str:
        """What the parser held back and turned out to be speech."""
        finish = getattr(self._parser, "finish_streaming", None)
        message = finish() if finish is not None else None
        return self._said((message.content or "") if message is not None else "")

    def _said(self, spoken: str) -> str:
        if not self._spoke:
            spoken = spoken.lstrip()
            self._spoke = bool(spoken)
        return spoken


def _parser_of(reasoning: Reasoning) -> type[ReasoningParser]:
    if reasoning.parser is not None:
        found: type[ReasoningParser] = ReasoningParserManager.get_reasoning_parser(reasoning.parser)
        return found
    # Where a prompt opens the thinking, all is thinking up to its end; else what comes before its start is speech.
    base = DeepSeekR1ReasoningParser if reasoning.opened else BaseThinkingReasoningParser
    return type("MarkedThinking", (base,), {"start_token": reasoning.start, "end_token": reasoning.end})


def check(reasoning: Reasoning, tokenizer: Any) -> None:
    """Raises `StartError` where replies could not be parsed."""
    thoughts = Thoughts(reasoning, tokenizer)
    try:
        thoughts.take("a", tokenizer.encode("a", add_special_tokens=False))
    except NotImplementedError:
        raise StartRefused(
            f"REASONING_PARSER={reasoning.parser} is not allowed: vLLM has it for another kind of server alone"
        ) from None
