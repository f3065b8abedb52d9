"""The frames of `/ws`: one tagged struct a message, decoded and encoded by msgspec.

In `Start` and `SetPersona` an absent field (`UNSET`) keeps the session's value, `null` clears it and
`""` sets it to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from yaptext.errors import BadMessage, WireError

_T = TypeVar("_T")
SessionId = Annotated[str, Meta(min_length=1, max_length=128)]
Gender = Literal["woman", "man"]
Identity = Literal["woman", "man", "non-binary"]
Count = Annotated[int, Meta(ge=0)]
GENDERS: dict[str, Gender] = {
    "woman": "woman", "man": "man", "female": "woman", "male": "man", "f": "woman", "m": "man",
}  # fmt: skip
"""What `assistant_gender` may be, trimmed and in any case, and the one spelling that the service uses."""
IDENTITIES: dict[str, Identity] = {"woman": "woman", "man": "man", "non-binary": "non-binary"}


def gender(value: str) -> Gender:
    """Raises `BadMessage`."""
    return _one_of(GENDERS, value, "assistant_gender")


def identity(value: str) -> Identity:
    """Raises `BadMessage`."""
    return _one_of(IDENTITIES, value, "user_identity")


def _one_of(known: Mapping[str, _T], value: str, field: str) -> _T:
    found = known.get(value.strip().lower())
    if found is None:
        raise BadMessage(f"Invalid value; allowed are {', '.join(known)} - at $.{field}")
    return found


# --- client -> server ---------------------------------------------------------------------------


class SamplingFields(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One turn's sampling; what is absent comes from the service's settings. After `soft_max_tokens` a reply ends with
    its sentence."""

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
    """One message of a history. `system` is text without a speaker; `name` is who spoke, if not just the role."""

    role: Literal["user", "assistant", "system"]
    content: str
    name: str | None = None


class Start(PersonaFields, frozen=True, omit_defaults=True, tag="start", kw_only=True):
    """`user_utterance` is null if the assistant is to speak first or to go on. `note` is text for this turn alone."""

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


class ToolResult(Struct, frozen=True, omit_defaults=True, tag="tool_result", kw_only=True):
    """`turn` is the turn whose calls these are."""

    session_id: SessionId
    turn: int
    results: list[ToolResultItem]
    sampling: SamplingFields | None = None


class Cancel(Struct, frozen=True, omit_defaults=True, tag="cancel"):
    """With `session_id` it reaches that session's turn on whatever socket it runs."""

    heard_chars: Count | None = None
    heard_text: str | None = None
    session_id: SessionId | None = None


class WarmPersona(PersonaFields, frozen=True, omit_defaults=True, tag="warm_persona"):
    session_id: SessionId | None = None


class WarmHistory(PersonaFields, frozen=True, omit_defaults=True, tag="warm_history", kw_only=True):
    history_text: str | None = None
    history: list[HistoryItem] | None = None
    session_id: SessionId | None = None


class SetPersona(PersonaFields, frozen=True, omit_defaults=True, tag="set_persona"):
    session_id: SessionId | None = None


class GetSession(Struct, frozen=True, tag="get_session"):
    session_id: SessionId


class Forget(Struct, frozen=True, tag="forget"):
    session_id: SessionId


class Ping(Struct, frozen=True, tag="ping"):
    pass


class End(Struct, frozen=True, tag="end"):
    pass


ClientMessage = Start | ToolResult | Cancel | WarmPersona | WarmHistory | SetPersona | GetSession | Forget | Ping | End

# --- server -> client ---------------------------------------------------------------------------


class Models(Struct, frozen=True):
    chat: str | None
    tool: str | None


class Ack(Struct, frozen=True, omit_defaults=True, tag="ack", kw_only=True):
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


class ToolCall(Struct, frozen=True, tag="toolcall", kw_only=True):
    status: Literal["yes", "no"]
    raw: list[IdentifiedCall]
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
    session_id: str | UnsetType = UNSET
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
    persona_style: str | None
    persona_text_override: bool
    messages: int
    """Of the history that was warmed."""
    bytes: int
    prefix_tokens: int
    cached_tokens: int
    prefix_stable: bool = True
    ms: float


class SessionState(Struct, frozen=True, tag="session", kw_only=True):
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


class Forgotten(Struct, frozen=True, tag="forgotten"):
    """Nothing of the session is kept any more; `known` is false if there was nothing."""

    session_id: str
    known: bool


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
    session_id: str | UnsetType = UNSET
    retry_after_ms: int | UnsetType = UNSET
    capacity: Capacity | UnsetType = UNSET


ServerMessage = Ack | ToolCall | Token | Final | Done | Warmed | SessionState | Forgotten | Pong | Error

_names_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encoder = msgspec.json.Encoder()
_OLD_NAMES = {
    "chat_prompt": "persona_text",
    "personality_prompt": "persona_text",
    "system_prompt": "persona_text",
    "gender": "assistant_gender",
    "personality": "persona_style",
    "style": "persona_style",
    "message": "user_utterance",
    "text": "user_utterance",
    "utterance": "user_utterance",
    "user_id": "session_id",
    "messages": "history",
}
"""Names that older clients have for fields. Any other unknown field of a turn is told in `ack.ignored`."""
_KNOWN = {
    str(cls.__struct_config__.tag): frozenset(cls.__struct_encode_fields__) | {"type"}
    for cls in get_args(ClientMessage)
}
_ROLES = "user, assistant, system"


_MAX_BYTES = {"tools": 65_536, "sampling": 4_096, "results": 131_072}
"""Most bytes of JSON that are looked at: what they hold costs up to 50 times as much as a text of that size."""
_MAX_NAMES = 4096


def _compact(cls: type[Struct]) -> type[Struct]:
    """The message with its costly fields unread, whatever a client writes there and how often."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(cls):
        kind = msgspec.Raw if field.name in _MAX_BYTES else field.type
        fields.append((field.name, kind) if field.required else (field.name, kind | UnsetType, field.default))
    return msgspec.defstruct(cls.__name__, fields, frozen=True, kw_only=True, tag=cls.__struct_config__.tag)


_WHOLE = {
    _compact(cls): (
        cls,
        {
            field.name: msgspec.json.Decoder(field.type, float_hook=float)
            for field in msgspec.structs.fields(cls)
            if field.name in _MAX_BYTES
        },
    )
    for cls in get_args(ClientMessage)
    if any(field.name in _MAX_BYTES for field in msgspec.structs.fields(cls))
}
_LIGHT = tuple(cls for cls in get_args(ClientMessage) if cls not in {whole for whole, _ in _WHOLE.values()})
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Union[(*_LIGHT, *_WHOLE)])


class Frame(NamedTuple):
    """A client's message, and the names of its fields that mean nothing here."""

    message: ClientMessage
    ignored: list[str]


def decode(frame: str | bytes) -> ClientMessage:
    """One client frame. Raises `BadMessage`, which names the field, for whatever is not of the protocol."""
    return read(frame).message


def read(frame: str | bytes) -> Frame:
    """As `decode`, with the unknown fields. Names of older clients count as today's."""
    *_, found = read_in_steps(frame)
    return cast(Frame, found)


def read_in_steps(frame: str | bytes) -> Iterator[Frame | None]:
    """As `read`, for a large frame: others may have their turn at each None, which the frame follows."""
    try:
        message: ClientMessage | None = _decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        message, problem = None, error
    yield None
    names = _names(frame)
    tag = None if names is None else _text(names.get("type"))
    if names is None or tag not in _KNOWN:
        if message is None:
            raise _refusal(problem, tag) from None
        yield Frame(message, [])
        return
    known = _KNOWN[tag]
    absent = known - names.keys()
    renamed = {
        _OLD_NAMES[name] if name not in known and _OLD_NAMES.get(name) in absent else name: value
        for name, value in names.items()
    }
    if renamed.keys() != names.keys():
        yield None
        try:
            message = _decode(msgspec.json.encode(renamed))
        except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
            message, problem = None, error
    if message is None:
        raise _refusal(problem, tag) from None
    yield Frame(message, sorted(name[:64] for name in renamed.keys() - known)[:32])


def _decode(frame: str | bytes) -> ClientMessage:
    found = _decoder.decode(frame)
    if type(found) not in _WHOLE:
        return cast(ClientMessage, found)
    cls, costly = _WHOLE[type(found)]
    values = msgspec.structs.asdict(found)
    for name, decoder in costly.items():
        raw = values[name]
        if not isinstance(raw, msgspec.Raw):
            continue
        if (size := memoryview(raw).nbytes) > (limit := _MAX_BYTES[name]):
            raise BadMessage(f"{name} are {size} bytes of JSON; limit is {limit} - at $.{name}")
        try:
            values[name] = decoder.decode(raw)
        except msgspec.ValidationError as error:
            reason, at, field = str(error).partition(" - at `$")
            raise msgspec.ValidationError(f"{reason} - at `$.{name}{field if at else '`'}") from None
    return cast(ClientMessage, cls(**values))


def _names(frame: str | bytes) -> dict[str, msgspec.Raw] | None:
    """None for a frame of so many fields that nobody meant them."""
    if (frame.count('":') if isinstance(frame, str) else frame.count(b'":')) > _MAX_NAMES:
        return None
    try:
        return _names_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None


def _text(raw: msgspec.Raw | None) -> str | None:
    try:
        return None if raw is None else msgspec.json.decode(raw, type=str)
    except (msgspec.DecodeError, UnicodeError):
        return None


def _refusal(error: Exception, tag: str | None) -> BadMessage:
    if tag is not None and tag not in _KNOWN:
        return BadMessage(f"Unknown type {tag[:64]!r}; known are {', '.join(_KNOWN)} - at $.type")
    reason, at, field = str(error).replace("`", "").rpartition(" - at ")
    reason = re.sub(r" '.*'", "", reason or field, flags=re.DOTALL)  # what the client sent
    if field.endswith(".role"):
        reason += f"; allowed are {_ROLES}"
    return BadMessage(reason[:200] + (at + field[:100] if at else ""))


def encode(message: ServerMessage) -> bytes:
    """One server frame, UTF-8."""
    return _encoder.encode(message)


def error_frame(
    error: WireError,
    *,
    turn: int | UnsetType = UNSET,
    session_id: str | UnsetType = UNSET,
    capacity: Capacity | UnsetType = UNSET,
) -> Error:
    return Error(
        error_code=error.code,
        message=error.message,
        turn=turn,
        session_id=session_id,
        retry_after_ms=UNSET if error.retry_after_ms is None else error.retry_after_ms,
        capacity=capacity,
    )
