"""A socket of `/ws`: its frames are messages of a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import cast

from starlette.websockets import WebSocket

from yaptext.dialogue.runtime import Runtime
from yaptext.errors import WireError
from yaptext.server.access.accounts import Account
from yaptext.server.conversation import Conversation
from yaptext.server.send_queue import TokenStream
from yaptext.server.socket import LARGE_BYTES, Socket
from yaptext.wire.frames import ClientMessage, Error, ServerMessage, encode, error_frame
from yaptext.wire.reading import Frame, read, read_in_steps


class Connection(Socket):
    """One accepted socket, and its conversation."""

    close_idle = 4000

    def __init__(
        self,
        websocket: WebSocket,
        runtime: Runtime,
        account: Account,
        *,
        at_rest: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        super().__init__(websocket, runtime, account)
        self.rests = partial(at_rest, self)
        self.conversation = Conversation(runtime, account, self)

    @property
    def busy(self) -> bool:
        return self.conversation.busy

    @property
    def session_id(self) -> str | None:
        """Of its last turn."""
        turn = self.conversation.turn
        return None if turn is None else turn.session.session_id

    def fail(self, error: WireError) -> None:
        if self.conversation.turn is not None:
            self.conversation.turn.fail(error)

    def _begin(self, group: asyncio.TaskGroup) -> None:
        self.conversation.begin(group)

    async def _stop(self, *, gone: bool) -> None:
        await self.conversation.stop(gone=gone)

    async def _act(self, frame: str | bytes) -> None:
        message: ClientMessage | None = None
        try:
            self._account.spend("messages")
            message, ignored = await self._read_large(frame) if len(frame) > LARGE_BYTES else read(frame)
            await self.conversation.handle(message, ignored)
        except WireError as error:
            self.send(error_frame(error, session_id=getattr(message, "session_id", None)))

    async def _read_large(self, frame: str | bytes) -> Frame:
        """One of all sockets at a time, and the loop has its turn between the steps."""
        async with self._runtime.large_frames:
            await asyncio.sleep(0)
            for found in read_in_steps(frame):
                if found is None:
                    await asyncio.sleep(0)
        return cast(Frame, found)

    def _error(self, error: WireError) -> bytes:
        return encode(error_frame(error))

    def send(self, message: ServerMessage) -> None:
        """Queues a frame. Never waits."""
        if isinstance(message, Error):
            self._runtime.metrics.errors.labels(message.error_code).inc()
        self._send_queue.put(message)

    def tokens(self, turn: int) -> TokenStream:
        return self._send_queue.open(turn)
