"""Why an engine did not open: the reason, found in what vLLM raises or its process logs.

vLLM's own error says "See root cause above" where its process failed: a plugin in that process leaves the reason in a
file, which the service names in the environment.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "YAP_TEXT_ENGINE_FAULT"
_LONGEST = 400


def register() -> None:
    """Leaves the reason of a failed start, from an engine's process."""
    if path := os.environ.get(VARIABLE):
        logging.getLogger("vllm.v1.engine.core").addFilter(lambda record: _note(record, Path(path)))


def _note(record: logging.LogRecord, path: Path) -> bool:
    if record.exc_info and record.exc_info[1] is not None and "failed to start" in str(record.msg):
        with suppress(OSError):
            path.write_text(reason(record.exc_info[1]), encoding="utf-8")
    return True


@contextmanager
def noted() -> Iterator[Path]:
    """A file for the reason of the engine that opens inside."""
    descriptor, name = tempfile.mkstemp(prefix="yap-text-fault.")
    os.close(descriptor)
    os.environ[VARIABLE] = name
    try:
        yield Path(name)
    finally:
        with suppress(OSError):
            os.unlink(name)


def reason(error: BaseException, note: Path | None = None) -> str:
    """One line: what the engine's process noted, what pydantic found wrong, else the first line of the error."""
    if note is not None:
        with suppress(OSError, UnicodeDecodeError):
            if noted := note.read_text(encoding="utf-8").strip():
                return noted
    found = getattr(error, "errors", None)
    with suppress(TypeError, KeyError, IndexError):
        if callable(found):
            return str(found()[0]["msg"]).removeprefix("Value error, ").splitlines()[0][:_LONGEST]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:_LONGEST]
