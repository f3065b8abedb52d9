"""Structured logs on stderr: one JSON object per line, for this process as for uvicorn's or vLLM's lines."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor

from yaptext.observe import expected, redact
from yaptext.observe.attention import Attention
from yaptext.observe.sinks import ToFile, ToStderr

_FORMAT, _PRIORITY = "YAPTEXT_LOG_FORMAT", "YAPTEXT_LOG_PRIORITY"
"""Environment variables that pass the configuration of the log on to engine processes."""
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_KEY_IN_URL = re.compile(r"((?:api(?:_|%5f)key|ticket)=)(?:\\u[0-9a-f]{4}|[^&\s\"'\\])+", re.IGNORECASE)
_NOISY = ["asyncio", "httpcore", "httpcore2", "httpx", "httpx2", "matplotlib"]
_NOISY += ["uvicorn", "uvicorn.access", "uvicorn.error"]


def without_keys(_: Any, __: str, line: str) -> str:
    """Removes keys and tickets of addresses from every line, whatever library wrote it."""
    return _KEY_IN_URL.sub(r"\1***", line)


def attention() -> list[str]:
    """The warnings of the start, once: see `Attention`."""
    kept = [handler.take() for handler in logging.getLogger().handlers if isinstance(handler, Attention)]
    return [line for lines in kept for line in lines]


def file_failure() -> str | None:
    """Why the log file cannot be written."""
    failures = (handler.failure for handler in logging.getLogger().handlers if isinstance(handler, ToFile))
    return next(filter(None, failures), None)


_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.ExtraAdder(allow=["status"]),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]


def _name_first(_: Any, __: str, event: EventDict) -> EventDict:
    """Event and level first, then the fields: `systemctl status` shows only the beginning of a line."""
    return {name: event[name] for name in ("event", "level") if name in event} | dict(event)


def formatter() -> logging.Formatter:
    """The formatter of every handler. Engine processes find it through `vllm_logging.json`."""
    inner = _formatter(os.environ.get(_FORMAT, "json"))
    chosen = _WithPriority(inner) if os.environ.get(_PRIORITY) else inner
    if redact.is_engine():
        redact.catch_crashes()
        # Whatever warns there besides vLLM would be printed as it is, words and all. Not by that JSON: vLLM also reads
        # it in the service's process, whose root has handlers of its own.
        if not logging.root.handlers:
            logging.root.addHandler(_to_stderr(chosen))
    return chosen


def _to_stderr(formatter: logging.Formatter) -> logging.Handler:
    handler = ToStderr(sys.stderr)
    handler.setFormatter(formatter)
    return handler


def _formatter(format: str) -> logging.Formatter:
    chain: list[Any] = [redact.hold_back, structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if format == "console":
        plain = structlog.dev.plain_traceback
        chain += [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain), without_keys]
    else:
        # Without locals: they hold what users say.
        tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
        chain += [tracebacks, _name_first, structlog.processors.JSONRenderer(), without_keys]
    return structlog.stdlib.ProcessorFormatter(processors=chain, foreign_pre_chain=_SHARED)


class _WithPriority(logging.Formatter):
    """Adds the prefix `<N>`, which journald reads as the priority of the line."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelname.lower(), 6)
        return f"<{priority}>{self._inner.format(record)}"


def configure(*, level: str, format: str, journald: bool, file: Path | None = None, text: bool = False) -> None:
    """Sends all logging of this process and its children through `formatter`. `format` is auto, json or
    console; auto is console if stderr is a terminal. `file` also gets the JSON lines of this process, and is
    opened again when a rotation has moved it. With `text` no text is removed. Raises `OSError` if the file
    cannot be written."""
    if format == "auto":
        format = "console" if sys.stderr.isatty() else "json"
    os.environ[_FORMAT] = format
    os.environ[_PRIORITY] = "1" if journald else ""
    os.environ[redact.WORDS] = "1" if text else ""
    os.environ[expected.LEVEL] = level
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_to_stderr(formatter()), Attention()]
    if file is not None:
        to_file = ToFile(file)
        to_file.setFormatter(_formatter("json"))
        root.addHandler(to_file)
    root.setLevel(level.upper())
    for noisy in _NOISY:
        logger = logging.getLogger(noisy)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    if text:
        structlog.get_logger(__name__).warning("text.logged", hint="LOG_TEXT=1: this log contains what users say")
