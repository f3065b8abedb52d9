"""The frames of `/ws`: one tagged struct a message, decoded and encoded by msgspec.

In `Start` and `SetPersona` an absent field (`UNSET`) keeps the session's value, `null` clears it and
`""` sets it to nothing.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from yaptext.errors import BadMessage, WireError

SessionId = Annotated[str, Meta(min_length=1, max_length=128)]
Gender = Literal["woman", "man"]
GenderIn = Literal["woman", "man", "female", "male"]
Identity = Literal["woman", "man", "non-binary"]
Count = Annotated[int, Meta(ge=0)]

_GENDER_ALIASES: dict[str, Gender] = {"female": "woman", "male": "man", "woman": "woman", "man": "man"}


def gender(value: GenderIn) -> Gender:
    """The one spelling the service uses for `assistant_gender`."""
    return _GENDER_ALIASES[value]


# --- client -> server ---------------------------------------------------------------------------


class SamplingFields(Struct, frozen=True, omit_defaults=True):
    """One turn's sampling; what is absent comes from the service's settings."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.1, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(max_length=8)] | None = None


class PersonaFields(Struct, frozen=True, omit_defaults=True):
    persona_text: str | UnsetType | None = UNSET
    persona_style: str | UnsetType | None = UNSET
    assistant_gender: GenderIn | UnsetType | None = UNSET
    user_identity: Identity | UnsetType | None = UNSET


class Start(PersonaFields, frozen=True, omit_defaults=True, tag="start", kw_only=True):
    session_id: SessionId
    user_utterance: str
    history_text: str | UnsetType | None = UNSET
    tools: list[dict[str, Any]] | UnsetType | None = UNSET
    sampling: SamplingFields | None = None
    heard_chars: Count | None = None


class Cancel(Struct, frozen=True, omit_defaults=True, tag="cancel"):
    heard_chars: Count | None = None


class WarmPersona(PersonaFields, frozen=True, omit_defaults=True, tag="warm_persona"):
    session_id: SessionId | None = None


class WarmHistory(PersonaFields, frozen=True, omit_defaults=True, tag="warm_history", kw_only=True):
    history_text: str
    session_id: SessionId | None = None


class SetPersona(PersonaFields, frozen=True, omit_defaults=True, tag="set_persona"):
    session_id: SessionId | None = None


class Ping(Struct, frozen=True, tag="ping"):
    pass


class End(Struct, frozen=True, tag="end"):
    pass


ClientMessage = Start | Cancel | WarmPersona | WarmHistory | SetPersona | Ping | End

# --- server -> client ---------------------------------------------------------------------------


class Models(Struct, frozen=True):
    chat: str | None
    tool: str | None


class Ack(Struct, frozen=True, omit_defaults=True, tag="ack", kw_only=True):
    for_: Literal["start", "set_persona"] = msgspec.field(name="for")
    ok: bool
    session_id: str
    turn: int
    seed: int
    now: str
    assistant_gender: Gender | None
    persona_style: str | None
    persona_text_override: bool
    models: Models


class Call(Struct, frozen=True):
    name: str
    arguments: dict[str, Any]


class ToolCall(Struct, frozen=True, tag="toolcall", kw_only=True):
    status: Literal["yes", "no"]
    raw: list[Call]
    turn: int
    tool_ms: float
    p: float | UnsetType = UNSET
    """Probability of yes, where TOOL_YES_THRESHOLD asks for it."""
    reason: str | UnsetType = UNSET


class Token(Struct, frozen=True, tag="token"):
    text: str
    turn: int


class Final(Struct, frozen=True, tag="final"):
    normalized_text: str
    turn: int


class Usage(Struct):
    """Model tokens of one turn. `cached_tokens` and `tool_cached_tokens` are prompt tokens that the engine did
    not compute again; `completion_tokens` counts the chat model's tokens only, `reasoning_tokens` those of them that
    were thinking, which is never sent."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    tool_prompt_tokens: int = 0
    tool_cached_tokens: int = 0


class Timings(Struct):
    """Milliseconds from the arrival of `start`; `null` where that point was not reached.

    `queue_ms` ends when the first engine gets its request, `tool_ms` is the decision alone, `ttft_ms` ends
    when the first token is queued for the socket.
    """

    queue_ms: float | None = None
    tool_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None


class Done(Struct, frozen=True, omit_defaults=True, tag="done", kw_only=True):
    """`turn` is 0 where a `cancel` found nothing running."""

    turn: int
    usage: Usage | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    cancelled: bool | UnsetType = UNSET
    cancel_ms: float | UnsetType = UNSET
    tokens_sent: int | UnsetType = UNSET


class Warmed(Struct, frozen=True, tag="warmed", kw_only=True):
    """`prefix_stable` is false if the chat template moves the persona or the history about: then a later turn finds
    only a part of them cached."""

    segment: Literal["persona_static", "history"]
    bytes: int
    prefix_tokens: int
    cached_tokens: int
    prefix_stable: bool = True
    ms: float


class Pong(Struct, frozen=True, tag="pong"):
    pass


class Capacity(Struct, frozen=True):
    active: int
    max: int
    available: int
    at_capacity: bool
    limited_by: Literal["kv_cache", "prefill"] | UnsetType = UNSET
    """Where it is not the number of connections that is at its limit."""


class Error(Struct, frozen=True, omit_defaults=True, tag="error", kw_only=True):
    error_code: str
    message: str
    turn: int | UnsetType = UNSET
    retry_after_ms: int | UnsetType = UNSET
    capacity: Capacity | UnsetType = UNSET


ServerMessage = Ack | ToolCall | Token | Final | Done | Warmed | Pong | Error

_decoder = msgspec.json.Decoder(ClientMessage)
_encoder = msgspec.json.Encoder()


def decode(frame: str | bytes) -> ClientMessage:
    """One client frame. Raises `BadMessage`, which names the field, for whatever is not of the protocol."""
    try:
        message: ClientMessage = _decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        reason, at, field = str(error).replace("`", "").rpartition(" - at ")
        reason = re.sub(r" '.*'", "", reason or field, flags=re.DOTALL)  # what the client sent
        raise BadMessage(reason[:200] + (at + field[:100] if at else "")) from None
    return message


def encode(message: ServerMessage) -> bytes:
    """One server frame, UTF-8."""
    return _encoder.encode(message)


def error_frame(error: WireError, *, turn: int | UnsetType = UNSET, capacity: Capacity | UnsetType = UNSET) -> Error:
    retry = UNSET if error.retry_after_ms is None else error.retry_after_ms
    return Error(error_code=error.code, message=error.message, turn=turn, retry_after_ms=retry, capacity=capacity)
