"""How a client's frame is read: whole, or refused with the field that is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union, cast

import msgspec
from msgspec import Struct, UnsetType

from yaptext.errors import BadMessage
from yaptext.wire.frames import CLIENT_MESSAGES, ClientMessage

_names_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeError)
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
"""Names that older clients use for fields. Any other unknown field of a turn is listed in `ack.ignored`."""
_KNOWN = {str(cls.__struct_config__.tag): frozenset(cls.__struct_encode_fields__) | {"type"} for cls in CLIENT_MESSAGES}
_ROLES = "user, assistant, system"
_MAX_BYTES = {"tools": 65_536, "sampling": 4_096, "results": 131_072}
"""Most bytes of JSON that are looked at: what they hold costs up to 50 times as much as a text of that size."""
_MAX_NAMES = 4096


class BoundedDecoder:
    """Decodes one of `classes`. A field in `limits` is looked at only if it has no more bytes of JSON than that."""

    def __init__(self, classes: Sequence[type[Struct]], limits: Mapping[str, int]) -> None:
        self._limits = limits
        self._whole = {self._compact(cls): (cls, costly) for cls in classes if (costly := self._costly(cls))}
        light = [cls for cls in classes if not self._costly(cls)]
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Union[(*light, *self._whole)])

    def _compact(self, cls: type[Struct]) -> type[Struct]:
        """The message with its costly fields unread, whatever a client writes there and how often."""
        fields: list[Any] = []
        for field in msgspec.structs.fields(cls):
            kind = msgspec.Raw if field.name in self._limits else field.type
            fields.append((field.name, kind) if field.required else (field.name, kind | UnsetType, field.default))
        return msgspec.defstruct(cls.__name__, fields, frozen=True, kw_only=True, tag=cls.__struct_config__.tag)

    def _costly(self, cls: type[Struct]) -> dict[str, msgspec.json.Decoder[Any]]:
        costly = (field for field in msgspec.structs.fields(cls) if field.name in self._limits)
        return {field.name: msgspec.json.Decoder(field.type, float_hook=float) for field in costly}

    def decode(self, frame: str | bytes) -> Any:
        """Raises `BadMessage` for a field over its limit, and what msgspec raises."""
        found = self._decoder.decode(frame)
        if type(found) not in self._whole:
            return found
        cls, costly = self._whole[type(found)]
        values = msgspec.structs.asdict(found)
        for name, decoder in costly.items():
            raw = values[name]
            if not isinstance(raw, msgspec.Raw):
                continue
            if (size := memoryview(raw).nbytes) > (limit := self._limits[name]):
                raise BadMessage(f"{name} are {size} bytes of JSON; limit is {limit} - at $.{name}")
            try:
                values[name] = decoder.decode(raw)
            except msgspec.ValidationError as error:
                reason, at, field = str(error).partition(" - at `$")
                raise msgspec.ValidationError(f"{reason} - at `$.{name}{field if at else '`'}") from None
        return cls(**values)


_decoder = BoundedDecoder(CLIENT_MESSAGES, _MAX_BYTES)


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
    message = _attempt(frame)
    yield None
    names = _names(frame)
    tag = None if names is None else _text(names.get("type"))
    ignored: list[str] = []
    if names is not None and tag in _KNOWN:
        known = _KNOWN[tag]
        absent = known - names.keys()
        renamed = {
            _OLD_NAMES[name] if name not in known and _OLD_NAMES.get(name) in absent else name: value
            for name, value in names.items()
        }
        if renamed.keys() != names.keys():
            yield None
            message = _attempt(msgspec.json.encode(renamed))
        ignored = sorted(name[:64] for name in renamed.keys() - known)[:32]
    if isinstance(message, Exception):
        raise _refusal(message, tag)
    yield Frame(message, ignored)


def _attempt(frame: str | bytes) -> ClientMessage | Exception:
    """The message, or what keeps the frame from being one."""
    try:
        return cast(ClientMessage, _decoder.decode(frame))
    except _UNREADABLE as error:
        return error


def _names(frame: str | bytes) -> dict[str, msgspec.Raw] | None:
    """None for a frame with more fields than any real client sends."""
    if (frame.count('":') if isinstance(frame, str) else frame.count(b'":')) > _MAX_NAMES:
        return None
    try:
        return _names_decoder.decode(frame)
    except _UNREADABLE:
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
