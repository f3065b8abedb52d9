"""tools/bench: HTTP answers and server-sent events, however the network cuts them."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yaptext.bench.http import Address, Getter, Malformed, Response, request
from yaptext.bench.sse import Events
from yaptext.client.errors import Refused

EVENTS = (
    ': a comment\r\ndata: {"a": 1}\r\n\r\n'
    "event: x\ndata:two\ndata: lines\n\n"
    "id: 3\n\n"
    "data: naïve ☕\r\r"
    "data: [DONE]\n\n"
)
DATA = ['{"a": 1}', "two\nlines", "naïve ☕", "[DONE]"]
CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;name=value\r\nhello\r\n1\r\n \r\n00A\r\n1\r\n3\r\n5\r\n7\r\n0\r\nTrailer: x\r\n\r\n"
)


def cuts(length: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, length), max_size=12).map(sorted)


def pieces(whole: bytes, at: list[int]) -> list[bytes]:
    return [whole[start:end] for start, end in zip([0, *at], [*at, len(whole)], strict=True)]


@given(cuts(len(EVENTS.encode())))
def test_events_do_not_depend_on_how_bytes_arrive(at: list[int]) -> None:
    """Cut anywhere: between a carriage return and its line feed, inside a character, inside a name."""
    events = Events()
    assert [event for piece in pieces(EVENTS.encode(), at) for event in events.feed(piece)] == DATA


def test_events_byte_by_byte() -> None:
    """The smallest pieces there are."""
    events = Events()
    assert [event for byte in EVENTS.encode() for event in events.feed(bytes([byte]))] == DATA


def test_an_event_that_is_not_over_is_not_told() -> None:
    """Its empty line is what ends it."""
    assert Events().feed(b"data: half\n") == []


@given(cuts(len(CHUNKED)))
def test_chunks_do_not_depend_on_how_bytes_arrive(at: list[int]) -> None:
    """Sizes, extensions, line ends and trailers may be cut anywhere; what looks like a size inside a chunk is not."""
    response = Response()
    body = b"".join(response.feed(piece) for piece in pieces(CHUNKED, at))
    assert (body, response.status, response.done) == (b"hello 1\r\n3\r\n5\r\n7", 200, True)
    assert response.stays_open


def test_a_length_ends_an_answer() -> None:
    """What comes after it is not of it; without any length the close of the connection ends it."""
    response = Response()
    assert response.feed(b"HTTP/1.1 404 Not Found\r\ncontent-length: 3\r\n\r\nabcdef") == b"abc" and response.done
    response = Response()
    assert response.feed(b"HTTP/1.1 200 OK\r\n\r\nabc") == b"abc" and not response.done
    response.end()
    assert response.done
    response = Response()
    assert response.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") == b"" and response.done


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_not_http_is_said_to_be_none(answer: bytes) -> None:
    """Also where it never ends: the buffer is bounded."""
    with pytest.raises(Malformed):
        Response().feed(answer)


def test_a_request_carries_its_length_and_its_key() -> None:
    """One request, ready to be written."""
    address = Address.parse("http://[::1]:8001/v1")
    assert address == ("::1", 8001, False, "/v1") and str(address) == "[::1]:8001"
    sent = request("POST", address, "/v1/x", key="k", body={"a": "ï"})
    head, _, body = sent.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /v1/x HTTP/1.1",
        b"Host: [::1]:8001",
        b"Authorization: Bearer k",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
    ]


@pytest.mark.parametrize("url", ["ftp://x/", "nonsense", "", "http://", "http://x:port/", "http://x:99999/"])
def test_what_is_no_address_is_named(url: str) -> None:
    """A wrong --openai is one line."""
    with pytest.raises(Refused, match=r"^cannot connect to "):
        Address.parse(url)


async def test_a_kept_connection_that_the_server_resets_is_opened_anew() -> None:
    """A server may cut it off at the very moment of the next request; without a kept one that is an error."""
    requests = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while await reader.read(4096):
            requests += 1
            if requests in (2, 4):
                linger = struct.pack("ii", 1, 0)  # a close is a reset
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.close()
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        getter = Getter(f"http://127.0.0.1:{port}", None)
        assert [await getter.get("/") for _ in range(2)] == [(200, "ok")] * 2
        assert requests == 3
        getter.close()
        with pytest.raises(Refused, match="the connection was closed"):
            await getter.get("/")
        getter.close()
