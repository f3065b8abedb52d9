"""The frames that the service writes by itself are the library's, bit for bit."""

from __future__ import annotations

import pytest
from websockets.frames import Frame, Opcode

from yaptext.server.protocol import _text_header


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65_535, 65_536, 1_000_000])
def test_a_text_frame_is_the_librarys(length: int) -> None:
    """At every size of the length field."""
    payload = b"x" * length
    assert _text_header(length) + payload == Frame(Opcode.TEXT, payload).serialize(mask=False)
