"""The rendered units and configs to install."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

COMMAND = "/usr/local/bin/yap-text"
"""The command of the rendered units."""


def folder() -> Path:
    """In the package, or beside it in a checkout."""
    inside = Path(__file__).parents[2] / "systemd"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "systemd"


def units() -> Iterator[Path]:
    for file in sorted(folder().iterdir()):
        if file.suffix in (".service", ".socket", ".timer"):
            yield file
