"""The log of a service that is still writing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(file: Path) -> list[str]:
    """All that have an end."""
    return file.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0].splitlines()


def events(file: Path, name: str) -> list[dict[str, Any]]:
    """What was told of one event, in order. Lines that are no JSON object are passed over."""
    told = (json.loads(line) for line in lines(file) if line.startswith("{"))
    return [event for event in told if event.get("event") == name]
