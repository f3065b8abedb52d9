"""The bodies of the HTTP routes outside `/v1/`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from yaptext.server.lifecycle import Phase
from yaptext.wire.frames import Capacity, Models

Count = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0)]


class Health(Struct):
    """`reason` names the engine that does not answer."""

    status: Literal["ok", "engine_dead", "engine_silent"]
    reason: str | UnsetType = UNSET


class Readiness(Struct):
    status: Phase | Literal["engine_silent"]
    reason: str | UnsetType = UNSET


class Starting(Struct):
    """The answer of every route while the engines open."""

    status: Literal["starting"]
    error_code: Literal["going_away"]
    message: str
    detail: str
    retry_after_ms: Count


class HttpError(Struct):
    """`detail` has the same text as `message`."""

    error_code: Literal["authentication_failed", "rate_limited", "host_not_allowed"]
    message: str
    detail: str


class Ticket(Struct):
    """`/ws?ticket=...` opens one socket with it."""

    ticket: str
    expires_in_s: Count


class ReloadState(Struct):
    """The latest reload of keys and personas. `error` is the reason if it was refused."""

    ok: bool
    error: str | None
    at: str


class PromptState(Struct):
    """How the prompts of a model are made."""

    format: str
    exact: bool
    prefix_stable: bool
    thinking: str
    reasoning_parser: str | UnsetType = UNSET


class EngineState(Struct):
    """One engine."""

    model: str
    quantization: str
    max_model_len: Count
    running: Count
    kv_use: Annotated[float, Meta(ge=0, le=1)]
    kv_tokens: Count
    backlog_ms: Amount
    prefill_tokens_per_s: Count


class FrameRefused(Struct):
    """The reason, as the frame `error` would give it."""

    error_code: str
    message: str
    detail: str


class ShownPrompt(Struct):
    """A prompt as text with its control tokens, and as token ids. The first `prefix_tokens` stay the same in later
    turns."""

    model: str
    format: str
    exact: bool
    prefix_stable: bool
    text: str
    ids: list[int]
    prefix_tokens: Count
    stop_ids: list[int]
    stop: list[str]
    thinking: str


class ShownPrompts(Struct):
    """By model. Null: the model would not be asked."""

    chat: ShownPrompt | None
    tool: ShownPrompt | None


class Status(Struct):
    """The state of the service."""

    status: Phase | Literal["running", "degraded", "engine_silent"]
    healthy: bool
    silence: str | None
    reload: ReloadState | None
    lacking: str | None
    version: str
    commit: str | None
    uptime_s: Amount
    deploy_models: Literal["both", "chat", "tool"]
    concurrent_model_call: bool
    demo: bool
    connections: Capacity
    session_tokens: Count
    sessions: Count
    session_bytes: Count
    session_bytes_max: Count
    session_file_failing: bool
    models: Models
    personas: list[str]
    prompt: dict[Literal["chat", "tool"], PromptState]
    engines: dict[str, EngineState]
