"""The bodies that `/v1/` answers with, as `/openapi.json` describes them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

FinishReason = Literal["stop", "length", "tool_calls"]
Count = Annotated[int, Meta(ge=0)]


class PromptTokensDetails(Struct):
    cached_tokens: Count


class CompletionTokensDetails(Struct):
    reasoning_tokens: Count


class CompletionUsage(Struct):
    """Tokens of the reply; if there is none, those of the decision."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CalledFunction(Struct):
    """`arguments` is an object as JSON text."""

    name: str
    arguments: str


class CompletionCall(Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Reply(Struct):
    """`content` is null if the reply is calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: Annotated[list[CompletionCall], Meta(min_length=1)] | UnsetType = UNSET


class TopLogprob(Struct):
    """`bytes` are the UTF-8 of `token`."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of the reply. `top_logprobs` are the likeliest tokens at its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None


class Choice(Struct):
    index: Literal[0]
    message: Reply
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class Completion(Struct):
    """`model` is the name that the request gave."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: Annotated[list[Choice], Meta(min_length=1, max_length=1)]
    usage: CompletionUsage


class DeltaCall(CompletionCall, kw_only=True):
    """A whole call."""

    index: Count


class Delta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[DeltaCall] | UnsetType = UNSET


class ChunkChoice(Struct):
    index: Literal[0]
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class Chunk(Struct):
    """One event of a stream. `usage` is there if the request asks for it: null, except in the last event, which has no
    choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: Annotated[list[ChunkChoice], Meta(max_length=1)]
    usage: CompletionUsage | UnsetType | None = UNSET


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Struct):
    object: Literal["list"]
    data: list[Model]


class ErrorDetail(Struct):
    """`param` is the field that is wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: Literal[
        "invalid_api_key",
        "invalid_value",
        "context_length_exceeded",
        "model_not_found",
        "previous_response_not_found",
        "host_not_allowed",
        "rate_limit_exceeded",
        "server_at_capacity",
        "going_away",
        "slow_client",
        "engine_failed",
        "internal",
    ]


class OpenAIError(Struct):
    """An error as OpenAI's clients read it."""

    error: ErrorDetail
