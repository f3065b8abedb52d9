"""server/transport.py: its own frames are the library's, bit for bit, and text is UTF-8."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import websockets
from conftest import service
from fakes import ScriptedEngine
from websockets.frames import Frame, Opcode

from yaptext.engine.base import Engines
from yaptext.server.transport import text_header


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65_535, 65_536, 1_000_000])
def test_a_text_frame_is_the_librarys(length: int) -> None:
    """At every size of the length field."""
    payload = b"x" * length
    assert text_header(length) + payload == Frame(Opcode.TEXT, payload).serialize(mask=False)


BROKEN = b'{"type":"ping","x":"\xff"}'


@pytest.mark.parametrize(
    "said",
    [BROKEN, [BROKEN[:5], BROKEN[5:]], b"\xed\xa0\x80", b"\xc3", [b'{"type":"ping"}', b"\xc3"]],
    ids=["whole", "in pieces", "a surrogate", "cut short", "in the last piece"],
)
async def test_text_that_is_no_utf8_closes_with_1007(said: bytes | Iterable[bytes]) -> None:
    """As RFC 6455 has it, and the slot is free."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running, running.connect() as socket:
        await socket.send(said, text=True)
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 1007


async def test_other_text_and_bytes_stay() -> None:
    """A letter that is split between two fragments is whole; bytes are no text, and a bad message at most."""
    engine = ScriptedEngine()
    split = '{"type":"ping","x":"ü"}'.encode()
    at = split.index(b"\xc3") + 1
    async with service(Engines(engine, engine)) as running, running.connect() as socket:
        for said, text in (([split[:at], split[at:]], True), (split, False), ("{}", None), (b'{"type":"\xff"}', False)):
            await socket.send(said, text=text)
        kinds = [json.loads(await socket.recv())["type"] for _ in range(4)]
        assert kinds == ["pong", "pong", "error", "error"]
