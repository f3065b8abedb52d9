"""How many blocks of KV cache each engine got at an earlier start, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from yaptext.engine.base import Role


class Sizes:
    """How many blocks of KV cache each engine got when it was alone while it measured: one deployment's, in one file.
    `measured_for` is all that decides them, as JSON has it."""

    def __init__(self, file: Path, measured_for: Any) -> None:
        self._file, self._measured_for = file, json.loads(json.dumps(measured_for))

    def recall(self) -> dict[Role, int] | None:
        """None where nothing is known of this very deployment."""
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            if kept["measured_for"] == self._measured_for:
                return {role: int(blocks) for role, blocks in kept["blocks"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no file, or a damaged one: its content is measured again
        return None

    def remember(self, blocks: Mapping[Role, int]) -> None:
        """As far as the disk lets it."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps({"measured_for": self._measured_for, "blocks": blocks}), encoding="utf-8")
            partial.replace(self._file)

    def forget(self) -> None:
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
