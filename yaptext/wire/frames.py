"""The frames of `/ws`: one tagged struct a message.

In `Start` and `SetPersona` an absent field (`UNSET`) keeps the session's value, `null` clears it, `""` empties it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from yaptext.errors import WireError

SessionId = Annotated[str, Meta(min_length=1, max_length=128)]
Gender = Literal["woman", "man"]
Identity = Literal["woman", "man", "non-binary"]
Count = Annotated[int, Meta(ge=0)]


class ClientMessage(Struct, frozen=True):
    """A frame that a client sends. Every subclass is a frame of the protocol. `cost` is what its key is charged for it,
    beside the "messages" that every frame costs."""

    cost: ClassVar[Literal["turns", "cancels"] | None] = None


class SamplingFields(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One turn's sampling; absent fields are the settings'. After `soft_max_tokens` a reply ends with its sentence."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.1, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] | None = None
    soft_max_tokens: Annotated[int, Meta(ge=1, le=4096)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(max_length=8)] | None = None


class PersonaFields(Struct, frozen=True, omit_defaults=True):
    persona_text: str | UnsetType | None = UNSET
    persona_style: str | UnsetType | None = UNSET
    assistant_gender: str | UnsetType | None = UNSET
    user_identity: str | UnsetType | None = UNSET


class HistoryItem(Struct, frozen=True, omit_defaults=True, gc=False):
    """One message of a history. `system` is text without a speaker; `name` is the speaker, if not just the role."""

    role: Literal["user", "assistant", "system"]
    content: str
    name: str | None = None


class Start(PersonaFields, ClientMessage, frozen=True, omit_defaults=True, tag="start", kw_only=True):
    """`user_utterance` is null if the assistant speaks first or continues. `note` is text for this turn only."""

    cost = "turns"
    session_id: SessionId
    user_utterance: str | None
    history_text: str | UnsetType | None = UNSET
    history: list[HistoryItem] | UnsetType | None = UNSET
    tools: list[dict[str, Any]] | UnsetType | None = UNSET
    await_tools: bool | None = None
    sampling: SamplingFields | None = None
    heard_chars: Count | None = None
    heard_text: str | None = None
    speakable: bool | None = None
    note: str | None = None


class ToolResultItem(Struct, frozen=True):
    """What one call returned: a text, or anything that JSON holds."""

    id: str
    content: Any


class ToolResult(ClientMessage, frozen=True, omit_defaults=True, tag="tool_result", kw_only=True):
    """`turn` is the turn whose calls these are."""

    cost = "turns"
    session_id: SessionId
    turn: int
    results: list[ToolResultItem]
    sampling: SamplingFields | None = None


class Cancel(ClientMessage, frozen=True, omit_defaults=True, tag="cancel"):
    """With `session_id` it reaches that session's turn on whatever socket it runs."""

    cost = "cancels"
    heard_chars: Count | None = None
    heard_text: str | None = None
    session_id: SessionId | None = None


class WarmPersona(PersonaFields, ClientMessage, frozen=True, omit_defaults=True, tag="warm_persona"):
    cost = "turns"
    session_id: SessionId | None = None


class WarmHistory(PersonaFields, ClientMessage, frozen=True, omit_defaults=True, tag="warm_history", kw_only=True):
    cost = "turns"
    history_text: str | None = None
    history: list[HistoryItem] | None = None
    session_id: SessionId | None = None


class SetPersona(PersonaFields, ClientMessage, frozen=True, omit_defaults=True, tag="set_persona"):
    session_id: SessionId | None = None


class GetSession(ClientMessage, frozen=True, tag="get_session"):
    session_id: SessionId


class Forget(ClientMessage, frozen=True, tag="forget"):
    session_id: SessionId


class Ping(ClientMessage, frozen=True, tag="ping"):
    pass


class End(ClientMessage, frozen=True, tag="end"):
    pass


CLIENT_MESSAGES = tuple(ClientMessage.__subclasses__())


class ServerMessage(Struct, frozen=True):
    """A frame that the service sends."""


class Models(Struct, frozen=True):
    chat: str | None
    tool: str | None


class Ack(ServerMessage, frozen=True, omit_defaults=True, tag="ack", kw_only=True):
    """`ignored` lists fields of the frame that this service does not know."""

    for_: Literal["start", "set_persona", "tool_result"] = msgspec.field(name="for")
    ok: bool
    session_id: str
    turn: int
    seed: int
    now: str
    assistant_gender: Gender | None
    persona_style: str | None
    persona_text_override: bool
    models: Models
    ignored: list[str] | UnsetType = UNSET


class Call(Struct, frozen=True):
    name: str
    arguments: dict[str, Any]


class IdentifiedCall(Struct, frozen=True):
    """A call as the client gets it, and answers it by `id` in a `tool_result`."""

    id: str
    name: str
    arguments: dict[str, Any]


class ToolCall(ServerMessage, frozen=True, tag="toolcall", kw_only=True):
    status: Literal["yes", "no"]
    raw: list[IdentifiedCall]
    turn: int
    tool_ms: float
    p: float | UnsetType = UNSET
    """Probability of yes, if TOOL_YES_THRESHOLD is set."""
    reason: str | UnsetType = UNSET


class Token(ServerMessage, frozen=True, tag="token"):
    text: str
    turn: int


class Final(ServerMessage, frozen=True, tag="final"):
    normalized_text: str
    turn: int


class Usage(Struct):
    """Model tokens of one turn: of the reply, and of the decision. Cached ones are prompt tokens that the engine did
    not compute again; `reasoning_tokens` are those of `completion_tokens` that were thinking, which is never sent."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    tool_prompt_tokens: int = 0
    tool_cached_tokens: int = 0
    tool_completion_tokens: int = 0


class Timings(Struct):
    """Milliseconds from the arrival of `start`; `null` if that point was not reached. `queue_ms` ends when the first
    engine gets its request, `tool_ms` is the decision alone, `ttft_ms` ends when the first token is queued for the
    socket."""

    queue_ms: float | None = None
    tool_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None


class Done(ServerMessage, frozen=True, omit_defaults=True, tag="done", kw_only=True):
    """`turn` is 0 if a `cancel` found nothing running."""

    turn: int
    session_id: str | UnsetType = UNSET
    usage: Usage | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    cancelled: bool | UnsetType = UNSET
    cancel_ms: float | UnsetType = UNSET
    tokens_sent: int | UnsetType = UNSET


class Warmed(ServerMessage, frozen=True, tag="warmed", kw_only=True):
    """`prefix_stable` is false if the chat template moves persona or history: later turns find only a part cached."""

    segment: Literal["persona_static", "history"]
    persona_style: str | None
    persona_text_override: bool
    messages: int
    """Of the history that was warmed."""
    bytes: int
    prefix_tokens: int
    cached_tokens: int
    prefix_stable: bool = True
    ms: float


class SessionState(ServerMessage, frozen=True, tag="session", kw_only=True):
    """A session as the next turn will find it. `history` is what the model will see of replies: what was heard."""

    session_id: str
    known: bool
    turns: int
    assistant_gender: Gender | None
    user_identity: Identity | None
    persona_style: str | None
    persona_text: str | None
    tools: list[str] | None
    history: list[HistoryItem]


class Forgotten(ServerMessage, frozen=True, tag="forgotten"):
    """Nothing of the session is kept any more; `known` is false if there was nothing."""

    session_id: str
    known: bool


class Pong(ServerMessage, frozen=True, tag="pong"):
    pass


class Capacity(Struct, frozen=True):
    active: int
    max: int
    available: int
    at_capacity: bool
    limited_by: Literal["kv_cache", "prefill"] | UnsetType = UNSET
    """The limit that is reached, if it is not the number of connections."""


class Error(ServerMessage, frozen=True, omit_defaults=True, tag="error", kw_only=True):
    error_code: str
    message: str
    turn: int | UnsetType = UNSET
    session_id: str | UnsetType = UNSET
    retry_after_ms: int | UnsetType = UNSET
    capacity: Capacity | UnsetType = UNSET


SERVER_MESSAGES = tuple(ServerMessage.__subclasses__())
encode = msgspec.json.Encoder().encode
"""One server frame, UTF-8."""


def error_frame(
    error: WireError, *, turn: int | None = None, session_id: str | None = None, capacity: Capacity | None = None
) -> Error:
    given = {"turn": turn, "session_id": session_id, "retry_after_ms": error.retry_after_ms, "capacity": capacity}
    more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Error(error_code=error.code, message=error.message, **more)
