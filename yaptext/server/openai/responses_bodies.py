"""The bodies and events that `/v1/responses` answers with, as `/openapi.json` describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from yaptext.server.openai.bodies import Count, ErrorDetail, TokenLogprob
from yaptext.server.openai.responses_schema import ChosenTool


class InputTokensDetails(Struct):
    cached_tokens: Count
    cache_write_tokens: Count


class OutputTokensDetails(Struct):
    reasoning_tokens: Count


class ResponseUsage(Struct):
    """Tokens of the reply; if there is none, those of the decision."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class OutputText(Struct):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Meta(max_length=0)]
    logprobs: list[TokenLogprob]


class OutputMessage(Struct, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: Annotated[list[OutputText], Meta(max_length=1)]


class OutputCall(Struct, tag_field="type", tag="function_call"):
    id: str
    status: Literal["in_progress", "completed"]
    call_id: str
    name: str
    arguments: str


class ResponseFailure(Struct):
    code: Literal["rate_limit_exceeded", "invalid_prompt", "server_error"]
    message: str


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens"]


class Response(Struct):
    """`output` is one message, or calls. Other fields repeat what the request said."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    previous_response_id: str | None
    parallel_tool_calls: bool
    tool_choice: Literal["none", "auto", "required"] | ChosenTool
    tools: list[dict[str, Any]]
    temperature: float | None
    top_p: float | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    store: bool


class Event(Struct, tag_field="type", kw_only=True):
    """`sequence_number` counts the events of a response, or of a socket."""

    sequence_number: Count


class Created(Event, tag="response.created"):
    response: Response


class InProgress(Event, tag="response.in_progress"):
    response: Response


class Completed(Event, tag="response.completed"):
    response: Response


class Incomplete(Event, tag="response.incomplete"):
    response: Response


class Failed(Event, tag="response.failed"):
    response: Response


class ItemAdded(Event, tag="response.output_item.added"):
    output_index: Count
    item: OutputMessage | OutputCall


class ItemDone(Event, tag="response.output_item.done"):
    output_index: Count
    item: OutputMessage | OutputCall


class InPart(Event):
    item_id: str
    output_index: Count
    content_index: Count


class PartAdded(InPart, tag="response.content_part.added"):
    part: OutputText


class PartDone(InPart, tag="response.content_part.done"):
    part: OutputText


class TextDelta(InPart, tag="response.output_text.delta"):
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(InPart, tag="response.output_text.done"):
    text: str
    logprobs: list[TokenLogprob]


class ArgumentsDelta(Event, tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: Count
    delta: str


class ArgumentsDone(Event, tag="response.function_call_arguments.done"):
    item_id: str
    output_index: Count
    name: str
    arguments: str


class SocketErrorDetail(ErrorDetail):
    headers: dict[str, str] | UnsetType = UNSET


class ErrorEvent(Event, tag="error"):
    """Only on a socket: a request was refused. `error.headers` has the time after which a retry may succeed."""

    status: int
    error: SocketErrorDetail


EVENTS = (
    Created, InProgress, Completed, Incomplete, Failed, ItemAdded, ItemDone, PartAdded, PartDone, TextDelta, TextDone,
    ArgumentsDelta, ArgumentsDone,
)  # fmt: skip
"""The events of a stream. A socket also sends `ErrorEvent`."""
