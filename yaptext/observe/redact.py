"""Removes user text from the log: libraries quote it in their messages."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import sys
import threading
import traceback
from typing import Any

from structlog.typing import EventDict

WORDS = "YAPTEXT_LOG_WORDS"
"""Set in the environment of this process and its engines if no text is removed."""
is_serving = False
_SAFE = (OSError, MemoryError)
_SAFE_NAMES = {"OutOfMemoryError", "AcceleratorError", "EngineDeadError"}
"""Exceptions of torch and vLLM whose message is about the machine."""


def serving() -> None:
    """From now on a failure may quote a conversation. Engine processes always remove text, except at their start."""
    global is_serving  # noqa: PLW0603  # logging is also one per process
    is_serving = True


def is_engine() -> bool:
    return multiprocessing.parent_process() is not None


def _held_back(record: logging.LogRecord) -> bool:
    if os.environ.get(WORDS):
        return False
    return is_serving or (is_engine() and "failed to start" not in str(record.msg))


def _wordless(error: BaseException) -> BaseException:
    """The same exception with its causes, without their messages."""
    words = str(error) if isinstance(error, _SAFE) or type(error).__name__ in _SAFE_NAMES else "(held back: LOG_TEXT=0)"
    if isinstance(error, BaseExceptionGroup):
        bare: BaseException = BaseExceptionGroup(words, [_wordless(each) for each in error.exceptions])
    else:
        named = type(type(error).__name__, (Exception,), {"__module__": type(error).__module__})
        bare = named(words)
    bare.__traceback__ = error.__traceback__
    bare.__cause__ = error.__cause__ and _wordless(error.__cause__)
    if error.__context__ is not error.__cause__:
        bare.__context__ = error.__context__ and _wordless(error.__context__)
    bare.__suppress_context__ = error.__suppress_context__
    return bare


def hold_back(_: Any, __: str, event: EventDict) -> EventDict:
    """Removes from an event what users may have said."""
    if _held_back(event["_record"]):
        if event["_record"].name == "asyncio":  # its message has the repr of a task, or of a callback's arguments
            event["event"] = re.split(r"[\n<]", event["event"])[0]
        if info := event.get("exc_info"):
            error = info if isinstance(info, BaseException) else sys.exc_info()[1] if info is True else info[1]
            if error is not None:
                bare = _wordless(error)
                event["exc_info"] = (type(bare), bare, bare.__traceback__)
    return event


def catch_crashes() -> None:
    """Logs uncaught exceptions, which Python would otherwise print with their messages."""
    log = logging.getLogger("vllm" if is_engine() else "yaptext")  # the one that has a handler there

    def hook(raised: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
        log.error("thread.crashed", exc_info=raised.exc_value)

    sys.excepthook = lambda *raised: log.critical("process.crashed", exc_info=raised)
    sys.unraisablehook = threading.excepthook = hook
    if is_engine():  # multiprocessing prints the exception that ended a process
        traceback.print_exc = lambda *_, **__: log.error("process.crashed", exc_info=True)


def is_wanted(record: logging.LogRecord) -> bool:
    """False for records that only contain conversations: the requests of a failed step, with stop strings and tools.
    Also for the traceback that uvicorn logs if a client sent text that is not UTF-8."""
    if record.msg == "Invalid UTF-8 sequence received from client.":
        return False
    return record.name != "vllm.logging_utils.dump_input" or not _held_back(record)
