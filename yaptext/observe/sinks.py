"""The outputs of the log (stderr, a file), each of which may be full or missing."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import structlog

from yaptext.observe.expected import lower
from yaptext.observe.redact import is_wanted

_log = structlog.get_logger(__name__)
FILE_PAUSE_S = 10.0
"""Seconds until a file that could not be written is tried again: on an almost full disk every other line would fit."""


class ToStderr(logging.StreamHandler[Any]):
    """The handler of this process and, through `vllm_logging.json`, of the engines'."""

    def __init__(self, stream: Any = None) -> None:
        super().__init__(stream)
        self.addFilter(is_wanted)
        self.addFilter(lower)

    def handleError(self, record: logging.LogRecord) -> None:
        """One line instead of the usual traceback with all arguments; nothing if stderr cannot be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) and record.name != __name__:
            _log.error("log.failed", of=record.name, error=type(error).__name__)


class ToFile(logging.Handler):
    """The log file: one write per line, opened again when a rotation has moved it. While it cannot be written, only
    stderr has the log, with one line about it; lost lines are counted. Raises `OSError` if it cannot be opened.

    The standard library's WatchedFileHandler buffers: on a full disk half a line would stay and be written again."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addFilter(is_wanted)
        self.addFilter(lower)
        self._path, self._lost, self._retry_at, self._tells = path, 0, 0.0, False
        self.failure: str | None = None
        """Why the file cannot be written; None while it can."""
        self._file: io.FileIO | None = io.FileIO(path, "a")

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() < self._retry_at:
            self._lost += 1
            return
        try:
            line = f"{self.format(record)}\n".encode(errors="replace")
        except Exception:
            return  # stderr has a line about it
        try:
            self._write(line)
        except OSError as error:
            first, self._lost = not self._lost, self._lost + 1
            self._retry_at = time.monotonic() + FILE_PAUSE_S
            self.failure = f"The log file {self._path} cannot be written: {error.strerror}."
            if first:
                _log.error("log.file_failed", file=str(self._path), error=str(error))
        else:
            lost, self._lost, self.failure = self._lost, 0, None
            if lost:
                _log.warning("log.file_again", file=str(self._path), lines_lost=lost)

    def _write(self, line: bytes) -> None:
        if self._file is None or not self._is_in_place(self._file):
            moved = self._file is not None and not self._tells
            self._close_file()
            self._file = io.FileIO(self._path, "a")
            if moved:  # this line is logged before the current one, and may itself find the file moved
                self._tells = True
                _log.info("log.file_opened", file=str(self._path), reason="the previous file was moved or deleted")
                self._tells = False
        written = self._file.write(line)
        if written < len(line):  # the disk is full: remove the half line
            self._file.truncate(os.fstat(self._file.fileno()).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_in_place(self, file: io.FileIO) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        self._close_file()
        super().close()
