"""Where the log goes if the settings are wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class LogPlaces(NamedTuple):
    """Read from the environment alone, for a start whose settings are wrong. A wrong value counts as unset."""

    format: str
    file: Path | None
    journal_stream: str | None
    notify_socket: str | None

    @classmethod
    def find(cls) -> LogPlaces:
        format, file = os.environ.get("LOG_FORMAT", ""), os.environ.get("YAP_TEXT_LOG_FILE")
        return cls(
            format if format in ("json", "console") else "auto",
            Path(file) if file else None,
            os.environ.get("JOURNAL_STREAM"),
            os.environ.get("NOTIFY_SOCKET"),
        )
