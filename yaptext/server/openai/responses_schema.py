"""The bodies of `/v1/responses`, as OpenAI's clients send them.

Unknown fields are ignored, as clients of newer versions send them. Bounds are those of `/ws`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from yaptext.server.openai.schema import Parts

LOGPROBS = "message.output_text.logprobs"
"""Of `include`; others are ignored."""


class Item(Struct, frozen=True):
    """A message, a call or its output; which fields it needs depends on `type`."""

    type: str = "message"
    role: Literal["developer", "system", "user", "assistant"] | None = None
    content: str | Parts | None = None
    call_id: str | None = None
    name: Annotated[str, Meta(max_length=128)] | None = None
    arguments: str | None = None
    output: str | Parts | None = None


class ChosenTool(Struct, frozen=True):
    name: str
    type: Literal["function"] = "function"


class Format(Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    schema: dict[str, Any] | None = None


class TextOptions(Struct, frozen=True):
    format: Format | None = None


class ResponsesRequest(Struct, frozen=True, kw_only=True):
    input: str | list[Item] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    store: bool | None = None
    generate: bool | None = None
    """False warms the prompt."""
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    background: bool | None = None
    conversation: Any = None
    user: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None


class Create(ResponsesRequest, frozen=True, kw_only=True, tag="response.create"):
    """A frame of a socket: the next response."""


class Cancel(Struct, frozen=True, tag="response.cancel"):
    """A frame of a socket: ends the response that runs."""

    response_id: str | None = None
