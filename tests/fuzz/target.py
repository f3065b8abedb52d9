"""What the fuzzers aim at: the service in its own process, a client of single bytes, and a sentinel on the side."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import journal
import msgspec

from yaptext.wire.frames import SERVER_MESSAGES, Error

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
_ANSWERS = msgspec.json.Decoder(Union[(*SERVER_MESSAGES,)])
_MASK = b"\x37\xfa\x21\x3d"


def frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, rsv: int = 0, size: int = 0) -> bytes:
    """A client's frame; `size` takes the longer forms of the length field (2 or 8 bytes)."""
    length = len(payload)
    first, mask = (0x80 if fin else 0) | rsv << 4 | opcode, 0x80 if masked else 0
    if size == 8 or length > 0xFFFF:
        head = struct.pack("!BBQ", first, mask | 127, length)
    elif size == 2 or length > 125:
        head = struct.pack("!BBH", first, mask | 126, length)
    else:
        head = bytes((first, mask | length))
    if not masked:
        return head + payload
    key = (_MASK * (length // 4 + 1))[:length]
    hidden = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(length, "big")
    return head + _MASK + hidden


class Client:
    """One TCP connection. Reads whole messages of the service and holds each against the protocol."""

    def __init__(
        self, port: int, *, host: str = "127.0.0.1", upgrade: bool = True, key: str = "yap_token", path: str = "/ws"
    ) -> None:
        self._path = path
        self.socket = socket.create_connection((host, port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read = b""
        self.close_code: int | None = None
        self.over = False
        """The service has closed its side."""
        self.errors: set[str] = set()
        if upgrade:
            self.send(
                b"GET %b HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-API-Key: "
                % path.encode()
                + key.encode()
                + b"\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            assert self._until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")

    def send(self, data: bytes) -> None:
        with suppress(OSError):  # the service has closed: what it said before is still to be read
            self.socket.sendall(data)

    def say(self, type: str, **fields: Any) -> None:
        self.send(frame(TEXT, json.dumps({"type": type, **fields}).encode()))

    def finish(self) -> None:
        """Says that nothing more will come."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Until the service closes. Raises `TimeoutError` where it neither answers nor closes for thirty seconds, and
        what msgspec raises for what is no message of the protocol."""
        while True:
            try:
                first, second = self._exactly(2)
                length = second & 127
                if length > 125:
                    length = int.from_bytes(self._exactly(2 if length == 126 else 8), "big")
                payload = self._exactly(length)
            except EOFError:
                self.over = True
                return
            assert first & 0x70 == 0 and first & 0x80 and second & 0x80 == 0, "the service's own frames are plain"
            match first & 15:
                case 1:
                    if self._path == "/ws" and isinstance(answer := _ANSWERS.decode(payload), Error):
                        self.errors.add(answer.error_code)
                    yield json.loads(payload)
                case 8:
                    self.close_code = int.from_bytes(payload[:2], "big") if payload else 1005
                case 9:
                    self.send(frame(PONG, payload))
                case opcode:
                    assert opcode == PONG, opcode

    def until(self, type: str) -> dict[str, Any] | None:
        return next((message for message in self.messages() if message["type"] == type), None)

    def response(self) -> bytes:
        """All that comes until the service closes."""
        while self._more():
            pass
        self.over = True
        return self._read

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._read:
            if not self._more():
                return self._read
        head, _, self._read = self._read.partition(mark)
        return head + mark

    def _exactly(self, size: int) -> bytes:
        while len(self._read) < size:
            if not self._more():
                raise EOFError
        found, self._read = self._read[:size], self._read[size:]
        return found

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65_536)
        except ConnectionError:
            return False
        self._read += data
        return bool(data)


@dataclass
class Sentinel:
    """A well-behaved client: turn after turn. `waits` are the seconds from each `start` to its `done`."""

    client: Client
    waits: list[float] = field(default_factory=list)
    fault: BaseException | None = None

    def __str__(self) -> str:
        waits = sorted(self.waits)
        p50, worst = waits[len(waits) // 2] * 1000, waits[-1] * 1000
        return f"sentinel: {len(waits)} turns, p50 {p50:.1f} ms, worst {worst:.0f} ms"

    def run(self, stop: threading.Event) -> None:
        client = self.client
        try:
            while not self.waits or not stop.wait(0.02):
                begun = time.monotonic()
                client.say("start", session_id="sentinel", user_utterance="hi", history_text="")
                assert client.until("done") is not None, f"closed with {client.close_code}"
                self.waits.append(time.monotonic() - begun)
            assert not client.errors, client.errors
        except BaseException as error:
            self.fault = error
        finally:
            client.close()


class Target:
    """The running service, and what is known of it."""

    def __init__(self, port: int, pid: int, log: Path, host: str = "127.0.0.1") -> None:
        self.port, self.pid, self._log, self._host = port, pid, log, host

    def inside(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self._host}:{self.port}/inside", timeout=30) as answer:
            found: dict[str, float] = json.load(answer)
        return found

    def settled(self, connections: int = 0) -> dict[str, float]:
        """What is inside as soon as `connections` are left and nothing runs for them."""
        deadline = time.monotonic() + 60
        while True:
            now = self.inside()
            if (now["connections"] == connections and now["running"] == 0) or time.monotonic() > deadline:
                return now
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Lines of the log that tell of a fault: errors, tracebacks, what is no JSON."""
        found = []
        for line in journal.lines(self._log):
            entry = json.loads(line) if line.startswith("{") else {}
            if not entry or "exception" in entry or entry.get("level") in ("error", "critical"):
                found.append(line[:2000])
        return found

    def lines(self, event: str) -> list[dict[str, Any]]:
        return journal.events(self._log, event)


@contextmanager
def target(folder: Path, command: list[str] | None = None, **variables: Any) -> Iterator[Target]:
    """The service with these settings; it must end well."""
    log = folder / "journal"
    readable, writable = os.pipe()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*(command or [sys.executable, str(Path(__file__).with_name("served.py"))]), str(writable)],
            env=environment | {name: str(value) for name, value in variables.items()},
            stderr=stderr,
            pass_fds=[writable],
        )
    os.close(writable)
    try:
        with os.fdopen(readable) as pipe:
            port = pipe.readline()
        assert port, log.read_text()
        yield Target(int(port), process.pid, log, str(variables.get("HOST", "127.0.0.1")))
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()[-3000:]


@contextmanager
def watched(aim: Target, key: str = "yap_token") -> Iterator[Sentinel]:
    """A sentinel is served while the block runs. It is connected before: no attack is in the way of its handshake."""
    sentinel, stop = Sentinel(Client(aim.port, key=key)), threading.Event()
    thread = threading.Thread(target=sentinel.run, args=(stop,))
    thread.start()
    try:
        yield sentinel
    finally:
        stop.set()
        thread.join()
    if sentinel.fault is not None:
        raise sentinel.fault
