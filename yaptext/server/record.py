"""What one process leaves for the next, in the state folder: which code it was, how long its start took, how it ended.

Nothing fails without it: a record that cannot be read is none, and a full disk keeps the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

_FILE = "start.json"
_MAX_BYTES = 16_384
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ENDS = {"stop": "a stop", "engine": "the death of an engine", None: "the end of a process that was killed or crashed"}

Ending = Literal["stop", "engine"]


class _Process(msgspec.Struct):
    models: list[str]
    seconds: float
    version: str
    boot: str
    end: Ending | None = None


class Record:
    """`last` is of the process before this one; `keep` and `ended` write this one's."""

    def __init__(self, state: Path, models: Sequence[str], version: str) -> None:
        self._file, self._boot = state / _FILE, _boot_id()
        self._own = _Process(list(models), 0.0, version, self._boot)
        self._last: _Process | None = None
        with suppress(OSError, msgspec.MsgspecError, UnicodeError):
            self._last = msgspec.json.decode(self._file.read_bytes()[:_MAX_BYTES], type=_Process)

    @property
    def last_seconds(self) -> float | None:
        """How long the last start with the same models took; None if it is not known."""
        last = self._last
        return last.seconds if last is not None and last.models == self._own.models and last.seconds > 0 else None

    @property
    def after(self) -> str | None:
        """What this start came after, in words; None for the first one."""
        last = self._last
        if last is None:
            return None
        told = [_ENDS[last.end]]
        if last.boot != self._boot:
            told.append("a boot of the machine")
        if last.version != self._own.version:
            told.append(f"a change of version from {last.version[:80]}")
        return ", ".join(told)

    @property
    def is_usual(self) -> bool:
        """Whether nothing but a stop, or nothing at all, came before."""
        return self.after in (None, _ENDS["stop"])

    def keep(self, seconds: float) -> None:
        """At READY."""
        self._own.seconds = round(seconds, 1)
        self._write()

    def ended(self, end: Ending) -> None:
        self._own.end = end
        self._write()

    def _write(self) -> None:
        part = self._file.with_name(f"{_FILE}.part")
        with suppress(OSError):
            part.write_bytes(msgspec.json.encode(self._own))
            part.replace(self._file)


def _boot_id() -> str:
    with suppress(OSError):
        return BOOT_ID.read_text().strip()
    return ""
