"""How a person or a unit learns why a command failed."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from pathlib import Path

from yaptext.commands import startup_logs

_MOST_STATUS = 600
"""Characters of a reason in STATUS=: systemd drops a message of over 4096 bytes."""


def of_doctor() -> str:
    """What else a person can do about a start that fails: the command as it can be run from here."""
    is_here = shutil.which("yap-text") is None and Path(sys.argv[0]).name == "yap-text"
    return f"what is wrong with settings, models and this machine: {sys.argv[0] if is_here else 'yap-text'} doctor"


def tell(lines: list[str]) -> None:
    for line in lines:
        print(f"yap-text: {line}", file=sys.stderr)


def tell_operator(
    lines: list[str],
    exit_status: int,
    event: str = "start.failed",
    headline: str = "The start failed",
    *,
    more: str | None = None,
) -> None:
    """Why a unit fails: one event wherever the log goes, and the text that `systemctl status` shows. A person at a
    terminal reads plain lines. `more` says what else there is to read."""
    import structlog

    from yaptext.observe import systemd

    if not structlog.is_configured():  # the settings themselves are wrong
        startup_logs.start_anyway()
    reason = " | ".join(lines)
    if sys.stderr.isatty():
        tell([*lines, more] if more else lines)
    else:
        hint = {"hint": more} if more else {}
        structlog.get_logger(__name__).critical(event, reason=reason, exit_status=exit_status, **hint)
    systemd.notify(f"STATUS={headline}: {reason[:_MOST_STATUS]}")


def tell_of_interrupt() -> None:
    """Ctrl-C, or the same signal from elsewhere: one line, the last of this process."""
    import structlog

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once, without a traceback
    eval("0")  # if the first one came within an eval, Python would end by the signal, and not with 130
    words = "stopped by Ctrl-C (SIGINT); nothing half-made is kept, what was finished before is"
    if sys.stderr.isatty() or not structlog.is_configured():
        tell([words])
    else:
        structlog.get_logger(__name__).warning("quantize.interrupted", reason=words, exit_status=130)
    logging.disable()  # torch writes figures at its exit, if it was stopped while it was imported
