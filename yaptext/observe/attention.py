"""Warnings of a start. Their lines scroll away, so the end of the start repeats them."""

from __future__ import annotations

import logging

_MOST, _MOST_CHARS = 8, 200


class Attention(logging.Handler):
    """Keeps the service's own warnings and errors as text until they are taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[str] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        event = record.msg
        if (
            self._kept is None or len(self._kept) >= _MOST or not isinstance(event, dict)
        ):  # a library's event is not a dict
            return
        if event.get("event") in _TOLD_WHILE_TRUE:
            return
        fields = {name: value for name, value in event.items() if name not in _OF_EVERY_LINE}
        said = " ".join(str(fields.pop(name)) for name in _WORDS if name in fields)
        rest = ", ".join(f"{name}={value}" for name, value in fields.items())
        told = f"{event.get('event')}: {said or rest}{f' ({rest})' if said and rest else ''}"
        self._kept.append(told[:_MOST_CHARS])

    def take(self) -> list[str]:
        """Returns the kept lines, and stops keeping."""
        kept, self._kept = self._kept or [], None
        return kept


_OF_EVERY_LINE = {"event", "level", "logger", "timestamp"}
_TOLD_WHILE_TRUE = {"log.file_failed", "sessions.not_read", "sessions.unsaved"}
"""These are shown in `STATUS=` for as long as they last (`Lifecycle.troubles`)."""
_WORDS = ("note", "hint", "error", "reason")
