"""Server-sent events, fed as bytes in pieces of any size."""

# The readers of httpx2 and of the packages made for this take a response, not bytes: they come with a client whose
# tasks are measured along (http.py). httpx2's parser alone, which is private, costs about as much as this one.

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class Events:
    """`feed` returns the data of each event that is complete. Comments and other fields are dropped, several data
    lines of one event are joined by line feeds, as the specification has it."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        self._buffer += piece
        found = []
        while line_end := _LINE_END.search(self._buffer):
            if line_end.group() == b"\r" and line_end.end() == len(self._buffer):
                break  # its line feed may still come
            line, self._buffer = self._buffer[: line_end.start()], self._buffer[line_end.end() :]
            if line:
                self._take(line)
            elif self._data:
                found.append(b"\n".join(self._data).decode(errors="replace"))
                self._data = []
        return found

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
