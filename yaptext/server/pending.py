"""TCP connections that hold no slot: how many there may be, how long each may stay."""

from __future__ import annotations

import asyncio
import os
import resource

import structlog

from yaptext.server.access.throttle import network

_log = structlog.get_logger(__name__)
_SPARE_FILES = 64
"""Descriptors for what is no socket of a client."""
_PENDING_ONE_IN = 8
"""This share of the connections may be without a slot, however few there are: a new one has none yet."""
_TELL_EVERY_S = 10.0
_ANSWERED = "answered"


class PendingConnections:
    """Connections without a slot: those that are not authenticated yet, plain HTTP, and refused ones that
    stay open. Each has `timeout_s`, and again so much after every HTTP response.

    Over `limit` one is cut off: the oldest of those that have had an answer, or else the oldest of the address that has
    most of the others. So clients that send many requests, or reconnect again and again, cannot push out
    the slow handshake of another client."""

    def __init__(self, limit: int, timeout_s: float) -> None:
        self.limit, self._timeout_s = limit, timeout_s
        self._waiting: dict[asyncio.Transport, tuple[asyncio.TimerHandle, str]] = {}
        """With the name of its crowd."""
        self.crowds: dict[str, dict[asyncio.Transport, None]] = {}
        """Those that have had an answer, and by address those that have not; in each the oldest first."""
        self._cut, self._told_at = 0, -_TELL_EVERY_S

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, transport: asyncio.Transport, *, answered: bool = False) -> None:
        """Gives the connection its time; one that is here already keeps its age."""
        loop = asyncio.get_running_loop()
        timer, crowd = self._waiting.get(transport) or (None, "")
        if timer is not None:
            timer.cancel()
        now_in = _ANSWERED if answered else crowd or _address(transport)
        if now_in != crowd:
            self._leave_crowd(transport, crowd)
            self.crowds.setdefault(now_in, {})[transport] = None
        # abort: a close would wait for ever for a client to read what is buffered.
        self._waiting[transport] = loop.call_later(self._timeout_s, transport.abort), now_in
        if len(self._waiting) > self.limit:
            oldest = next(iter(self.crowds.get(_ANSWERED) or max(self.crowds.values(), key=len)))
            self.leave(oldest)
            oldest.abort()
            self._tell(loop.time())

    def leave(self, transport: asyncio.Transport) -> None:
        timer, crowd = self._waiting.pop(transport, (None, ""))
        if timer is not None:
            timer.cancel()
            self._leave_crowd(transport, crowd)

    def _leave_crowd(self, transport: asyncio.Transport, name: str) -> None:
        crowd = self.crowds.get(name, {})
        crowd.pop(transport, None)
        if not crowd:
            self.crowds.pop(name, None)

    def _tell(self, now: float) -> None:
        self._cut += 1
        if now - self._told_at >= _TELL_EVERY_S:
            _log.warning("pending.full", connections_cut=self._cut, limit=self.limit)
            self._cut, self._told_at = 0, now


def _address(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("peername")
    return network(peer[0]) if peer else "unknown"


def fitting(connections: int, pending: int) -> tuple[int, int]:
    """How many connections with a slot and how many without the descriptors of this process allow, at most as given.

    Raises the process's own limit where it may. At the limit accepting fails, for clients with a key as well: what is
    short is first taken from `pending`, down to a share, then from `connections`."""
    used = len(os.listdir("/proc/self/fd")) + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = used + connections + pending
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= wanted:
        return connections, pending
    room = max(2, soft - used)
    slots = min(connections, room - min(pending, max(1, room // _PENDING_ONE_IN)))
    hint = f"at most {soft} files are allowed, {wanted} are needed for {connections} connections and {pending} pending"
    _log.warning("files.short", max_connections=slots, max_pending_handshakes=room - slots, hint=hint)
    return slots, room - slots
