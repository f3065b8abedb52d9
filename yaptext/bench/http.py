"""HTTP/1.1 on a byte stream, as little of it as a bench needs: one request at a time, answers read piece by piece."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from yaptext.client.client import Refused

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
        self.headers: dict[str, str] = {}
        self.done = False
        self._buffer = b""
        self._left: int | None = None
        """Bytes of the body, or of the current chunk, that are still to come; None until a length is known."""
        self._chunked = self._in_trailer = False

    def feed(self, data: bytes) -> bytes:
        """Raises `Malformed`. What comes after the end of the answer is ignored."""
        self._buffer += data
        if self.status is None and not self._read_head():
            return b""
        if self._chunked:
            return self._read_chunks()
        body, self._buffer = self._buffer, b""
        if self._left is not None:
            body = body[: self._left]
            self._left -= len(body)
            self.done = self._left == 0
        return body

    def end(self) -> None:
        """The connection is closed: the end of a body without a length."""
        if self.status is not None and self._left is None and not self._chunked:
            self.done = True

    def _read_head(self) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            if len(self._buffer) > _MAX_HEAD:
                raise Malformed(f"no end of the headers in {_MAX_HEAD} bytes")
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, told = first.partition(" ")
        if not version.startswith("HTTP/1.") or not told[:3].isdigit():
            raise Malformed(f"not an HTTP/1.1 answer: {first[:80]!r}")
        self._buffer = rest
        if told.startswith("1"):  # 100 Continue and the like: the answer comes after it
            return self._read_head()
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.status = int(told[:3])
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if not self._chunked and "content-length" in self.headers:
            self._left = _number(self.headers["content-length"], 10)
        if self.status in (204, 304):
            self._left = 0
        return True

    def _read_chunks(self) -> bytes:
        body = b""
        while not self.done:
            if self._left:
                piece, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
                body += piece
                self._left -= len(piece)
                if self._left:
                    break
            line, found, rest = self._buffer.partition(b"\r\n")
            if not found:
                if len(self._buffer) > _MAX_HEAD:
                    raise Malformed(f"no end of a chunk's size in {_MAX_HEAD} bytes")
                break
            if self._left == 0:  # the line end that closes a chunk
                if line:
                    raise Malformed("a chunk is longer than it said")
                self._left = None
            elif self._in_trailer:
                self.done = not line
            else:
                self._left = _number(line.partition(b";")[0].decode("latin-1"), 16) or None
                self._in_trailer = self._left is None
            self._buffer = rest
        return body


def _number(text: str, base: int) -> int:
    try:
        number = int(text.strip(), base)
    except ValueError:
        number = -1
    if number < 0:
        raise Malformed(f"not a length: {text[:40]!r}")
    return number


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
