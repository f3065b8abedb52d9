"""A request as vLLM takes it, without what vLLM repeats for each one.

All of that holds up the event loop, and with it every other socket. By profile, with a prompt of 3,000 tokens and the
built-in tools: 1.1 ms to check a grammar that was checked before, 0.2 ms to copy parameters, 0.9 ms to decode the whole
prompt before the first token's text.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import tokenizers.decoders
from vllm.inputs import TokensPrompt, tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from yaptext.engine.base import Sampling

_DECODED_BEFORE = 16
"""Tokens of a prompt that say how the first of a reply reads: whether after a space, for one."""
WHOLE: Any = tokenizers.decoders.DecodeStream
decoders: list[str] = []
"""Of the engines that were opened."""

KEPT_SCHEMAS = 256
valid_schemas: OrderedDict[str, None] = OrderedDict()
"""Schemas that vLLM has found valid. No `LRUCache`: a thread adds what the event loop reads, and each step on this dict
is one that no other thread can come into."""


class _Params(SamplingParams):  # type: ignore[misc]
    """Of one request, so that nothing of it needs a copy."""

    def _validate_structured_outputs(self, model_config: Any, config: Any, tokenizer: Any) -> None:
        constraint = self.structured_outputs
        if constraint is None:
            return
        try:
            valid_schemas.move_to_end(constraint.json)
        except KeyError:  # not in it, or just dropped by the thread that checks new ones
            pass
        else:
            constraint._backend = config.backend
            return
        super()._validate_structured_outputs(model_config, config, tokenizer)
        valid_schemas[constraint.json] = None
        if len(valid_schemas) > KEPT_SCHEMAS:
            valid_schemas.popitem(last=False)


def prompt_of(ids: Sequence[int], sampling: Sampling) -> Any:
    """The prompt in the form that vLLM takes as it is; under a schema that it has yet to check (10 ms, for many tools),
    in the form that it looks at in a thread."""
    if sampling.json_schema is None or sampling.json_schema in valid_schemas:
        return tokens_input(list(ids), cache_salt=sampling.cache_salt or None)
    return TokensPrompt(prompt_token_ids=list(ids), cache_salt=sampling.cache_salt or None)


def params_of(sampling: Sampling) -> SamplingParams:
    constraint = None
    if sampling.json_schema is not None:
        constraint = StructuredOutputsParams(json=sampling.json_schema)
    return _Params(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        logit_bias=dict(sampling.logit_bias) or None,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_ids) or None,
        # Marks around thinking may be special tokens: its parser looks for their text.
        skip_special_tokens=sampling.reasoning is None,
        structured_outputs=constraint,
        logprobs=sampling.alternatives or None,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )


def alternatives_of(logprobs: Any) -> list[dict[str, float]]:
    """Probability by text, a dict a token. Two tokens may read the same."""
    found = []
    for token in logprobs or ():
        by_text: dict[str, float] = {}
        for entry in token.values():
            text = entry.decoded_token or ""
            by_text[text] = by_text.get(text, 0.0) + math.exp(entry.logprob)
        found.append(by_text)
    return found


def decode_from_the_end(tokenizer: Any) -> None:
    """Has vLLM prime its decoders with the end of a prompt instead of all of it; not where the tokenizer of an engine
    reads a run of bytes as one, of which the end says nothing. vLLM looks the class up at each request, for those who
    replace it."""
    decoders.append(repr(tokenizer.backend_tokenizer.decoder))
    by_runs = any("ByteFallback" in decoder for decoder in decoders)
    tokenizers.decoders.DecodeStream = WHOLE if by_runs else primed_with_the_end  # type: ignore[misc,assignment]


def primed_with_the_end(ids: Sequence[int] | None = None, skip_special_tokens: bool = False) -> Any:
    return WHOLE(ids=None if ids is None else list(ids[-_DECODED_BEFORE:]), skip_special_tokens=skip_special_tokens)
