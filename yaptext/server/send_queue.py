"""The bounded queue from turns to one client: frames in order, tokens merged while the client is slow.

While the socket takes what comes, nothing is queued: a frame is on its way when `put` or `push` returns."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from yaptext.wire.frames import ServerMessage, Token, encode

WRITE_NOW = "yaptext.write_now"
"""The ASGI extension of a socket that has a `WriteNow`; on others every frame goes through the queue and its task."""
LINK = "yaptext.link"
"""The ASGI extension of an HTTP request: a `transport.HttpLink`."""
WriteNow = Callable[[bytes], bool]
"""Writes a frame, or answers False where the socket cannot take one."""
_TOKEN_FRAME_BYTES = 40
"""What a token frame costs besides its text."""


class TokenStream:
    """The tokens of one turn on their way out. Tokens that wait together leave in one frame."""

    __slots__ = (
        "_send_queue", "encode", "pending", "pending_bytes", "pending_tokens", "queued", "sent", "sent_tokens", "turn",
    )  # fmt: skip

    def __init__(self, queue: SendQueue, turn: int, encode: Callable[[Token], bytes]) -> None:
        self._send_queue, self.turn, self.encode = queue, turn, encode
        self.pending: list[str] = []
        self.pending_tokens = 0
        self.pending_bytes = 0
        self.queued = False
        self.sent: list[str] = []
        self.sent_tokens = 0

    def push(self, text: str, tokens: int) -> None:
        queue = self._send_queue
        if queue.idle and queue.write_now(self.encode(Token(text=text, turn=self.turn))):
            self.sent.append(text)
            self.sent_tokens += tokens
            return
        self.pending.append(text)
        self.pending_tokens += tokens
        size = len(text) if text.isascii() else len(text.encode())
        self.pending_bytes += size
        self._send_queue.tokens_waiting(self, size)

    def retract(self) -> str:
        """Drops what still waits; returns the text that was handed to the socket."""
        self._clear()
        return "".join(self.sent)

    def take(self) -> str:
        """All that waits, now counted as sent."""
        text = "".join(self.pending)
        self.sent.append(text)
        self.sent_tokens += self.pending_tokens
        self._clear()
        return text

    def _clear(self) -> None:
        self._send_queue.tokens_gone(self)
        self.pending.clear()
        self.pending_tokens = self.pending_bytes = 0


class SendQueue:
    """Frames for one client. Putting never waits; one task writes.

    Over `max_bytes` of waiting frames `on_overflow` is called once: the client does not keep up. With
    `flush_s` tokens after the first of a turn gather that long; any other frame takes them along at once.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        flush_s: float,
        on_overflow: Callable[[], None],
        write_now: WriteNow | None = None,
    ) -> None:
        self._queue: deque[bytes | TokenStream | None] = deque()
        self._max_bytes, self._flush_s, self._on_overflow = max_bytes, flush_s, on_overflow
        self._bytes = 0
        self._overflowed = False
        self.write_now = write_now or (lambda _: False)
        self._writing = True
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()

    @property
    def idle(self) -> bool:
        """True while nothing waits, so that a frame may go out at once without overtaking another."""
        return not self._queue and not self._writing and not self._flush_s

    def open(self, turn: int, encode: Callable[[Token], bytes] = encode) -> TokenStream:
        """`encode` may be called more than once for the same text."""
        return TokenStream(self, turn, encode)

    def put(self, message: ServerMessage) -> None:
        self.put_frame(encode(message))

    def put_frame(self, frame: bytes) -> None:
        if self.idle and self.write_now(frame):
            return
        self._queue.append(frame)
        self._urgent.set()
        self._grow(len(frame))

    def finish(self) -> None:
        """After this, `write` returns when all that waits is written."""
        self._queue.append(None)
        self._urgent.set()
        self._wake.set()

    def tokens_waiting(self, stream: TokenStream, size: int) -> None:
        if not stream.queued:
            stream.queued = True
            self._queue.append(stream)
            size += _TOKEN_FRAME_BYTES
        self._grow(size)

    def tokens_gone(self, stream: TokenStream) -> None:
        if stream.queued:
            self._bytes -= stream.pending_bytes + _TOKEN_FRAME_BYTES
            stream.queued = False

    def _grow(self, size: int) -> None:
        self._bytes += size
        self._wake.set()
        if self._bytes > self._max_bytes and not self._overflowed:
            self._overflowed = True
            self._on_overflow()

    async def write(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Writes frames in order until `finish`, or until `send` raises."""
        last_turn, last_at = 0, 0.0
        while True:
            while not self._queue:
                self._writing = False
                self._wake.clear()
                await self._wake.wait()
            self._writing = True
            item = self._queue[0]
            if item is None:
                return
            if isinstance(item, bytes):
                self._queue.popleft()
                self._bytes -= len(item)
                await send(item)
                continue
            if self._flush_s and item.turn == last_turn and len(self._queue) == 1:
                await self._gather(last_at + self._flush_s - time.monotonic())
            self._queue.popleft()
            if item.queued:  # else it was retracted while it waited
                last_turn, last_at = item.turn, time.monotonic()
                await send(item.encode(Token(text=item.take(), turn=item.turn)))

    async def _gather(self, seconds: float) -> None:
        """Waits for more tokens, or for the first frame that is not a token."""
        if seconds <= 0:
            return
        self._urgent.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._urgent.wait()
        except TimeoutError:
            pass
