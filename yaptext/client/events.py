"""What the service sends, as typed frozen events: the structs of the wire."""

from __future__ import annotations

from typing import Any, Union

import msgspec

from yaptext.client.errors import Unreadable
from yaptext.wire.frames import SERVER_MESSAGES, Ack, Done, Final, ServerMessage, Token, ToolCall

Event = Ack | ToolCall | Token | Final | Done
"""An event of a turn, in the order of the types."""

_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Union[(*SERVER_MESSAGES,)])
_KNOWN = {cls.__struct_config__.tag for cls in SERVER_MESSAGES}


class _Type(msgspec.Struct):
    type: str = ""


_type_decoder = msgspec.json.Decoder(_Type)


def event_of(frame: str | bytes) -> ServerMessage | None:
    """The event of a frame; None for a type that this version does not know. Unknown fields are ignored. Raises
    `Unreadable` for anything else."""
    try:
        event: ServerMessage = _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeError) as error:
        try:
            kind = _type_decoder.decode(frame).type
        except (msgspec.DecodeError, UnicodeError):
            kind = ""
        if kind and kind not in _KNOWN:
            return None
        raise Unreadable(f"the service sent a frame that cannot be read: {kind or 'no type'}: {error}") from None
    return event
