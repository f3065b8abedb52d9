"""Slots for sockets: how many conversations the deployment carries at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from yaptext.errors import ServerAtCapacity
from yaptext.wire.messages import Capacity

if TYPE_CHECKING:
    from yaptext.server.connection import Connection

_RETRY_AFTER_MS = 2000


class Admission:
    """At most `limit` connections. A slot is a context manager, so that it cannot leak."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.connections: set[Connection] = set()

    @property
    def capacity(self) -> Capacity:
        active = len(self.connections)
        return Capacity(
            active=active, max=self.limit, available=max(0, self.limit - active), at_capacity=active >= self.limit
        )

    @contextmanager
    def slot(self, connection: Connection) -> Iterator[None]:
        """Holds a place for the connection. Raises `ServerAtCapacity` where there is none."""
        if len(self.connections) >= self.limit:
            raise ServerAtCapacity("Server is at capacity.", retry_after_ms=_RETRY_AFTER_MS)
        self.connections.add(connection)
        try:
            yield
        finally:
            self.connections.discard(connection)
