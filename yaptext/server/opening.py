"""The answers while the engines open: 503 with the time to wait, from the first second of a start.

Opening the engines holds the event loop for seconds at a time, so a thread answers, without ASGI and without a key. The
answer says that the service starts, and how far its downloads are, but not of which models: that takes a key. A
browser that opens the playground gets a page that says the same, and that becomes the playground.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from yaptext.engine.underway import size, underway

_MAX_HEAD_BYTES = 16_384
_MAX_CLIENTS = 256
"""At once; the one that has waited longest makes room."""
_HEAD_WITHIN_S = 5.0
_LEAVE_WITHIN_S = 1.0
"""For a client to read its answer: what it still sends would otherwise throw that away."""
_LOOK_S = 0.5
_LEAST_WAIT_S = 2.0
_UNKNOWN_WAIT_S = 15.0
_LONGEST_DOWNLOAD_WAIT_S = 60.0
"""A client looks again meanwhile: a download may become faster."""
_PAGE = (Path(__file__).parent / "playground" / "opening.html").read_text(encoding="utf-8")
_ASKS_FOR_HTML = re.compile(rb"\r\naccept:[^\r\n]*text/html", re.IGNORECASE)
_MESSAGE = "The service is starting."


def _hash_of(part: str) -> str:
    """The hash by which the policy allows the one inline `part` of the page. No other file can be served meanwhile."""
    (inline,) = re.findall(f"<{part}>(.*?)</{part}>", _PAGE, re.DOTALL)
    return base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()


_POLICY = (
    f"default-src 'none'; script-src 'sha256-{_hash_of('script')}'; style-src 'sha256-{_hash_of('style')}'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(slots=True)
class _Client:
    until: float
    head: bytes = b""
    answered: bool = False


class Opening:
    """Answers on listening sockets while its block runs. `expected_s` is what the last start took; `page`: the service
    will have one at `/`."""

    def __init__(self, listeners: Sequence[socket.socket], expected_s: float | None, *, page: bool = True) -> None:
        self._listeners, self._expected_s, self._page = listeners, expected_s, page
        self.begun = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="opening", daemon=True)

    def __enter__(self) -> Self:
        for listener in self._listeners:
            listener.setblocking(False)
        self._wake, self._woken = socket.socketpair()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.close()
        self.thread.join()
        self._woken.close()

    @property
    def retry_after_s(self) -> int:
        """Whole seconds until the service is likely to be ready."""
        passed = time.monotonic() - self.begun
        left = _UNKNOWN_WAIT_S if self._expected_s is None else self._expected_s - passed
        if (download := underway()) is not None:
            return math.ceil(min(max(_UNKNOWN_WAIT_S, download.left_s or 0), _LONGEST_DOWNLOAD_WAIT_S))
        # A start that takes longer than expected is assumed to take a part of its time more.
        return math.ceil(max(_LEAST_WAIT_S, left, passed / 4 if left <= 0 else 0))

    def _run(self) -> None:
        clients: dict[socket.socket, _Client] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(_LOOK_S)]
                if self._woken in ready:
                    break
                for found in ready:
                    assert isinstance(found, socket.socket)
                    if found in clients:
                        if not self._serve(found, clients[found]):
                            _leave(found, clients, selector)
                    else:
                        self._accept(found, clients, selector)
                now = time.monotonic()
                for late in [client for client, state in clients.items() if state.until < now]:
                    _leave(late, clients, selector)
            for client, state in list(clients.items()):
                if not state.answered:
                    self._answer(client, state)
                _leave(client, clients, selector)

    def _accept(
        self, listener: socket.socket, clients: dict[socket.socket, _Client], selector: selectors.BaseSelector
    ) -> None:
        try:
            client, _ = listener.accept()
        except OSError:  # it has left, or there are no more files: others' turn
            time.sleep(0.01)
            return
        client.setblocking(False)
        if len(clients) >= _MAX_CLIENTS:
            _leave(next(iter(clients)), clients, selector)
        clients[client] = _Client(time.monotonic() + _HEAD_WITHIN_S)
        selector.register(client, selectors.EVENT_READ)

    def _serve(self, client: socket.socket, state: _Client) -> bool:
        """Reads what came, and answers a whole request. False if the client has left."""
        try:
            came = client.recv(_MAX_HEAD_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not came:
            return False
        if not state.answered:
            state.head += came
            if b"\r\n\r\n" in state.head or len(state.head) > _MAX_HEAD_BYTES:
                return self._answer(client, state)
        return True

    def _answer(self, client: socket.socket, state: _Client) -> bool:
        state.answered, state.until = True, time.monotonic() + _LEAVE_WITHIN_S
        path = state.head.partition(b" ")[2].partition(b" ")[0].partition(b"?")[0]
        wait_s, message = self.retry_after_s, _MESSAGE
        if (download := underway()) is not None:
            message = f"{message} It downloads its models: {size(download.done_bytes)} of {size(download.total_bytes)}."
        status = b"200 OK" if path == b"/livez" else b"503 Service Unavailable"
        if self._page and path == b"/" and _ASKS_FOR_HTML.search(state.head):
            body = _PAGE.replace("MESSAGE", message).encode()
            kind = f"text/html; charset=utf-8\r\nContent-Security-Policy: {_POLICY}\r\nVary: Accept"
        else:
            content = {
                "status": "starting",
                "error_code": "going_away",
                "message": message,
                "detail": message,
                "retry_after_ms": wait_s * 1000,
            }
            body, kind = json.dumps(content).encode(), "application/json"
        head = (
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\nRetry-After: {wait_s}\r\n"
            "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        )
        try:
            client.sendall(b"HTTP/1.1 %b\r\n" % status + head.encode() + body)  # fits any send buffer
            client.shutdown(socket.SHUT_WR)
        except OSError:
            return False
        return True


def _leave(client: socket.socket, clients: dict[socket.socket, _Client], selector: selectors.BaseSelector) -> None:
    del clients[client]
    selector.unregister(client)
    client.close()
