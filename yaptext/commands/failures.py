"""Shows a person or systemd why a command failed."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from pathlib import Path

from yaptext.commands import startup_logs

_MOST_STATUS = 600
"""Characters of a reason in STATUS=: systemd drops messages over 4096 bytes."""


def of_doctor() -> str:
    """A further hint after a failed start: the `doctor` command as it can be run from here."""
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
    """Reports a failed unit: one event in the log, and the text that `systemctl status` shows. On a terminal it prints
    plain lines. `more` is a further hint."""
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

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second signal ends the process at once, without a traceback
    eval("0")  # if the first signal came during an eval, Python would end by the signal, not with 130
    words = "stopped by Ctrl-C (SIGINT); no partial result is kept; results finished before are"
    if sys.stderr.isatty() or not structlog.is_configured():
        tell([words])
    else:
        structlog.get_logger(__name__).warning("quantize.interrupted", reason=words, exit_status=130)
    logging.disable()  # torch logs figures at exit if its import was interrupted
