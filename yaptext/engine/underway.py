"""How far downloads are: for a person a line that changes, for the journal lines, for the supervisor words."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import structlog

from yaptext.engine.download_plan import File, Plan
from yaptext.observe.systemd import notify

Progress = Callable[[int, int], None]
"""Called with the bytes done, what was there before included, and the bytes in all; never by two threads at once.
What it raises ends the transfer."""

_LINE_EVERY_S, _STATUS_EVERY_S = 30.0, 2.0
_ALIVE_S, _OPENS_S = 120, 3600
"""For EXTEND_TIMEOUT_USEC=: how long the supervisor may hear nothing, and what the start gets after a download."""

_log = structlog.get_logger(__name__)


class Underway(NamedTuple):
    """`left_s` is by the mean speed of this run, None if that is not known yet."""

    done_bytes: int
    total_bytes: int
    left_s: int | None


_underway: Underway | None = None


def underway() -> Underway | None:
    """How far the downloads of this process are, None if there are none. For any thread."""
    return _underway


def _set(found: Underway | None) -> None:
    global _underway  # noqa: PLW0603  # one process downloads for itself
    _underway = found


def size(bytes_: float) -> str:
    """For people, as disks and networks are sold."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= of:
            return f"{bytes_ / of:.1f} {unit}"
    return f"{bytes_:.0f} bytes"


def duration(seconds: float) -> str:
    """For people: the two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


class Teller:
    """Reports the plans' transfers while its block runs. `is_watched`: a person reads standard error, who
    gets one line a model; else the journal gets one a file, and one in half a minute.

    The supervisor waits for as long as something is downloaded, and then once more for the whole time of a start.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        is_watched: bool,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plans, self._is_watched, self._progress, self._clock = plans, is_watched, progress, clock
        self._lock = threading.Lock()
        self._total = sum(plan.total_bytes for plan in plans)
        self._there = self._done = sum(plan.there_bytes for plan in plans)
        self._begun = self._line_at = clock()
        self._status_at = float("-inf")
        self._plan, self._plan_done = plans[0], plans[0].there_bytes

    def __enter__(self) -> Teller:
        _set(Underway(self._done, self._total, None))
        if not self._is_watched:
            _log.info("download.started", **self._named(), bytes=self._total, there_bytes=self._there)
        if self._progress is not None:
            self._progress(self._done, self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _set(None)
        if kind is not None:
            if self._is_watched:
                print("\x1b[K", end="", file=sys.stderr, flush=True)
            return
        notify(f"EXTEND_TIMEOUT_USEC={_OPENS_S * 10**6}")
        if not self._is_watched:
            seconds = round(self._clock() - self._begun, 1)
            _log.info("download.finished", **self._named(), bytes=self._total - self._there, seconds=seconds)

    def _named(self) -> dict[str, object]:
        return {"models": [plan.repo for plan in self._plans], "files": sum(len(plan.missing) for plan in self._plans)}

    @contextmanager
    def bringing(self, plan: Plan) -> Iterator[None]:
        """Around the transfer of one of the plans."""
        begun = self._clock()
        with self._lock:
            self._plan, self._plan_done = plan, plan.there_bytes
        yield
        if self._is_watched:
            told = f"{size(plan.total_bytes - plan.there_bytes)} in {duration(self._clock() - begun)}"
            print(f"{plan.label}: {told}\x1b[K", file=sys.stderr, flush=True)

    def came(self, bytes_: int) -> None:
        """From any thread. Negative if bytes are fetched again."""
        with self._lock:
            self._done += bytes_
            self._plan_done += bytes_
            if self._progress is not None and bytes_:
                self._progress(self._done, self._total)

    def file(self, plan: Plan, file: File, seconds: float) -> None:
        """One more is whole. From any thread."""
        if not self._is_watched:
            _log.info("download.file", repo=plan.repo, file=file.path, bytes=file.size, seconds=round(seconds, 1))

    def tick(self) -> None:
        """Often, from the thread that waits."""
        with self._lock:
            now, done, plan, of_plan = self._clock(), self._done, self._plan, self._plan_done
        seconds = now - self._begun
        rate = max(0.0, (done - self._there) / seconds) if seconds > 0 else 0.0
        left_s = round((self._total - done) / rate) if rate else None
        _set(Underway(done, self._total, left_s))
        far = f"{plan.label}: {size(of_plan)} of {size(plan.total_bytes)}"
        left = f", {duration((plan.total_bytes - of_plan) / rate)} left" if rate else ""
        if self._is_watched:
            line = f"{far}, {size(rate)}/s{left}"[: shutil.get_terminal_size().columns - 1]
            # Back to the begin of the line: what else is written, is written over it.
            print(f"{line}\x1b[K\r", end="", file=sys.stderr, flush=True)
        if now - self._status_at >= _STATUS_EVERY_S:
            self._status_at = now
            notify(f"STATUS=Downloading {far}{left}.", f"EXTEND_TIMEOUT_USEC={_ALIVE_S * 10**6}")
        if now - self._line_at >= _LINE_EVERY_S and not self._is_watched:
            self._line_at = now
            bytes_ = {"done_bytes": done, "total_bytes": self._total, "bytes_per_s": round(rate)}
            _log.info("download.progress", repo=plan.repo, **bytes_, left_s=left_s)
