"""Opens the log of `serve` and `quantize`, also if the settings are wrong."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress

from yaptext.errors import SettingsError
from yaptext.settings import Settings
from yaptext.settings.log_places import LogPlaces
from yaptext.settings.old_names import moved_names
from yaptext.settings.slips import unknown_names


def start(settings: Settings) -> None:
    """Opens the log and systemd's socket, and logs a line for each old name in use."""
    from yaptext.observe import logs, redact, systemd

    systemd.connect(settings.notify_socket)
    try:
        logs.configure(
            level=settings.log_level,
            format=settings.log_format,
            journald=_is_journal(settings.journal_stream),
            file=settings.log_file,
            text=settings.log_text,
        )
    except OSError as error:
        raise SettingsError(f"YAP_TEXT_LOG_FILE={str(settings.log_file)!r} cannot be written: {error}") from None
    redact.catch_crashes()
    logging.captureWarnings(True)
    for kind in (FutureWarning, DeprecationWarning):  # of torch, vLLM and autoawq, about their own next versions
        warnings.simplefilter("ignore", kind)
    import structlog

    log = structlog.get_logger(__name__)
    for note in moved_names().notes:
        log.warning("setting.moved", note=note)
    for note in unknown_names():
        log.warning("setting.unknown", note=note)


def start_anyway() -> None:
    """Opens the log with the environment alone, as far as possible."""
    from yaptext.observe import logs, systemd

    places = LogPlaces.find()
    systemd.connect(places.notify_socket)
    with suppress(OSError):  # of the file: stderr has the log by then
        logs.configure(
            level="info", format=places.format, journald=_is_journal(places.journal_stream), file=places.file
        )


def _is_journal(stream: str | None) -> bool:
    """JOURNAL_STREAM is inherited by shells too: it applies only if stderr is that stream."""
    if stream is None:
        return False
    status = os.fstat(sys.stderr.fileno())
    return stream == f"{status.st_dev}:{status.st_ino}"
