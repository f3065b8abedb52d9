"""How a body or a frame of OpenAI's clients is read, with limits on the parts that cost more than their bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from yaptext.errors import BadMessage
from yaptext.wire.reading import BoundedDecoder

_MAX_BYTES = {
    "tools": 65_536,
    "response_format": 65_536,
    "text": 65_536,
    "metadata": 16_384,
    "stop": 4_096,
    "conversation": 1_024,
}
"""Limits in bytes of JSON. Reading these fields costs up to 50 times as much as a text of the same size."""
_MOST_OBJECTS = 16_384


def reader(*kinds: type[Struct]) -> Callable[[str | bytes], Any]:
    """A function that reads one of `kinds`. It raises `BadMessage`, which names the field."""
    decode = BoundedDecoder(kinds, _MAX_BYTES).decode

    def read(content: str | bytes) -> Any:
        objects = content.count("{") if isinstance(content, str) else content.count(b"{")
        if objects > _MOST_OBJECTS:
            raise BadMessage(f"there are {objects} opening braces; limit is {_MOST_OBJECTS}")
        try:
            return decode(content)
        except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
            raise BadMessage(str(error).replace("`", "")) from None

    return read
