"""HTTP/1.1 on a byte stream, as little of it as a bench needs: one request at a time, answers read piece by piece."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from yaptext.client.errors import Refused

# llhttp parses; connections are our own. With aiohttp's a token costs the client 91, 76 and 41 us of CPU at 1, 64 and
# 256 streams instead of 61, 39 and 23, since a task wakes for each, and first tokens are seen 0.24, 0.27 and 0.16 ms
# later (p50; medians of three or four rounds, tests/bench/README.md). With httpx2's it costs 148 to 191 us. That would
# be measured along with the server.

_MAX_HEAD = 65_536


class Address(NamedTuple):
    """Where a server listens, and the path that was asked for."""

    host: str
    port: int
    secure: bool
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """`http`, `https`, `ws` and `wss` addresses. Raises `Refused`."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise Refused(f"cannot connect to {url}: {error}") from None
        if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
            raise Refused(f"cannot connect to {url}: that is no address")
        secure = parts.scheme in ("https", "wss")
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        return cls(parts.hostname, port or (443 if secure else 80), secure, path)

    @property
    def tls(self) -> ssl.SSLContext | None:
        return ssl.create_default_context() if self.secure else None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def request(method: str, address: Address, path: str, *, key: str | None = None, body: Any = None) -> bytes:
    """One request, `body` as JSON. The key goes as `Authorization: Bearer`."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address}"]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


class Malformed(ValueError):
    """What came is not HTTP/1.1."""


class Response:
    """One answer, fed as it arrives, in pieces of any size. `feed` returns the bytes of the body that are new."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.done = False
        self.stays_open = False
        """Another request may follow on this connection."""
        self._has_end = False
        """The answer itself says where its body ends."""
        self._body, self._head_bytes = b"", 0
        self._parser = HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """Raises `Malformed`. What comes after the end of the answer is ignored."""
        self._body = b""
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self.done:
                raise Malformed(str(error)) from None
        self._head_bytes += len(data) if self.status is None else 0
        if self._head_bytes > _MAX_HEAD:
            raise Malformed(f"no end of the headers in {_MAX_HEAD} bytes")
        return self._body

    def end(self) -> None:
        """The connection is closed: the end of a body without a length."""
        if self.status is not None and not self._has_end:
            self.done = True

    # Called by the parser.

    def on_header(self, name: bytes, _: bytes) -> None:
        self._has_end |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        if not self.done and self._parser.get_status_code() >= 200:  # before it there may be a 100 Continue
            self.status, self.stays_open = self._parser.get_status_code(), self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        if not self.done:
            self._body += body

    def on_message_complete(self) -> None:
        self.done = self.status is not None


class Getter:
    """GET requests over one connection that stays open."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url, self._key = url, key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text. Raises `Refused`."""
        address = Address.parse(self._url)
        kept = self._streams is not None
        try:
            answer = await self._get(address, path)
            if answer is None and kept:  # it was idle for so long that the server has closed it
                self.close()
                answer = await self._get(address, path)
        except (OSError, Malformed) as error:
            raise Refused(f"cannot get {path} of {address}: {error}") from None
        if answer is None:
            raise Refused(f"cannot get {path} of {address}: the connection was closed")
        return answer

    async def _get(self, address: Address, path: str) -> tuple[int, str] | None:
        """None where the connection was closed before the end of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(address.host, address.port, ssl=address.tls)
        reader, writer = self._streams
        writer.write(request("GET", address, path, key=self._key))
        response, body = Response(), b""
        while not response.done:
            try:
                data = await reader.read(65_536)
            except ConnectionError:  # a server that has cut it off may say so with a reset
                data = b""
            if not data:
                response.end()
                break
            body += response.feed(data)
        if response.status is None or not response.done:
            return None
        return response.status, body.decode(errors="replace")

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None
