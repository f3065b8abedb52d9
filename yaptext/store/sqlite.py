"""The session file: sessions in SQLite, written behind the turns.

No turn waits for it: `put` leaves a copy, and one thread writes what has changed. Rows are found by a hash, and with a
key nothing in them can be read. Failed writes are logged in one line, kept in memory and tried again. A session
that cannot be a row is left out, alone; what a newer version wrote is never replaced.

A disk that is full or read-only is read all the same. Until the file was read, no row of it is replaced: what changes
waits in memory, and reading is tried again before each write. Sessions that are read late come back when their clients
do. If a session of the same key began before that, memory keeps the new one, and its row is both: the old transcript,
then the new one.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from concurrent.futures import Future

import structlog

from yaptext.errors import YapError
from yaptext.store.base import SessionKey, SessionRecord
from yaptext.store.sqlite_rows import Rows

log = structlog.get_logger(__name__)
_GATHER_S, RETRY_S, _SWEEP_S = 0.5, 5.0, 60.0
"""What changes within the first goes into one write; a failed one is tried again; what has expired is deleted."""


class SessionFile:
    """The store of one file, held by one process."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self._path, self._clock = rows, rows.path, rows.clock
        self._guard = threading.Lock()
        self._waiting: dict[SessionKey, tuple[float, SessionRecord]] = {}
        self._writing: Mapping[SessionKey, tuple[float, SessionRecord]] = {}
        self._forgotten: dict[SessionKey, Future[None]] = {}
        self._unread = True
        """The file may have rows that were not read."""
        self.late: dict[SessionKey, tuple[float, SessionRecord]] = {}
        """Sessions that were read after `load`, until their clients return."""
        self._earlier: dict[SessionKey, tuple[float, SessionRecord]] = {}
        """Of them those of a key with a new session. Each row of the new one begins with the old one."""
        self._failure: str | None = None
        self._sweep_at = 0.0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name="sessions", daemon=True)

    @property
    def trouble(self) -> str | None:
        """The last write or the load went wrong, or nothing writes any more."""
        if self.thread.ident is not None and not self.thread.is_alive() and not self.stopping.is_set():
            return f"Sessions are no longer saved in {self._path}: the log has the reason (sessions.writer_died)."
        return self._failure

    def load(self) -> list[tuple[float, SessionRecord]]:
        try:
            return self._read()
        except (OSError, sqlite3.Error) as error:
            if self.rows.is_missing():
                self._fail(error)
                return []
            log.error(
                "sessions.not_read",
                file=str(self._path),
                error=str(error),
                hint="clients do not find its sessions until it can be read, and nothing in it is replaced; the "
                "service tries again, and keeps new turns in memory until then",
            )
            self._failure = f"Sessions cannot be read from {self._path}: {error}."
            return []

    def start(self) -> None:
        self.thread.start()

    def put(self, used_at: float, record: SessionRecord) -> None:
        with self._guard:
            if late := self.late.pop(record.key, None):
                self._earlier[record.key] = late
            self._waiting.pop(record.key, None)
            self._waiting[record.key] = used_at, record
            if len(self._waiting) > self.rows.max_sessions:
                del self._waiting[next(iter(self._waiting))]

    def take(self, key: SessionKey) -> tuple[float, SessionRecord] | None:
        with self._guard:
            return self.late.pop(key, None)

    def forget(self, key: SessionKey) -> Future[None]:
        with self._guard:
            for kept in (self._waiting, self.late, self._earlier):
                kept.pop(key, None)
            return self._forgotten.setdefault(key, Future())

    def close(self, timeout_s: float) -> None:
        """Tells how many sessions could not be written."""
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join(timeout_s)
        lost = len({*self._waiting, *self._writing, *self.rows.left_out})
        if lost:
            log.error("sessions.lost", file=str(self._path), sessions=lost)
        if not self.thread.is_alive():
            self.rows.let_go()

    # --- the thread

    def run(self) -> None:
        try:
            while not self.stopping.wait(RETRY_S if self._failure else _GATHER_S):
                self.write()
            self._sweep_at = 0.0
            self.write()
        except BaseException as error:  # `write` lives through every `Exception` of a write
            log.error(
                "sessions.writer_died",
                file=str(self._path),
                error=type(error).__name__,
                hint="conversations continue but are no longer saved; restart the service",
            )
        finally:
            self.rows.close()

    def write(self) -> None:
        with self._guard:
            self._writing, self._waiting = self._waiting, {}
            forgotten = dict(self._forgotten)
        due = self._clock() >= self._sweep_at or bool(forgotten)
        if not self._writing and not due:
            return
        try:
            if self._unread:
                self._read_late()
            self.rows.save((self._whole(*kept) for kept in self._writing.values()), forgotten, erase=due)
            if due:
                self._drop_late()
                self._sweep_at = self._clock() + _SWEEP_S
            with self._guard:
                for key, done in forgotten.items():
                    self._forgotten.pop(key, None)
                    if done.set_running_or_notify_cancel():
                        done.set_result(None)
        except Exception as error:  # also an unforeseen one: waiting writes are tried again
            self.rows.close()
            with self._guard:
                again = {key: kept for key, kept in self._writing.items() if key not in self._forgotten}
                self._waiting = {**again, **self._waiting}
            self._fail(error)
        else:
            if self._failure:
                log.info("sessions.saved", file=str(self._path), sessions=len(self._writing))
            self._failure = None
        self._writing = {}

    def _fail(self, error: Exception) -> None:
        known = isinstance(error, (OSError, sqlite3.Error, YapError))
        said = str(error) if known else type(error).__name__  # the words of others may quote what was said
        if not self._failure:
            log.warning(
                "sessions.unsaved",
                file=str(self._path),
                error=said,
                sessions=len(self._waiting),
                hint="conversations continue; changes are lost if the service restarts before the file can be written",
            )
        self._failure = f"Sessions are not saved in {self._path}: {said}."

    # --- what is read late

    def _read(self) -> list[tuple[float, SessionRecord]]:
        found, refused = self.rows.read()
        if refused is not None:
            self._fail(refused)
        self._unread = False
        return found

    def _read_late(self) -> None:
        """What `load` could not read, for `take`. A session that has changed since is another one of the same key."""
        found = self._read()
        with self._guard:
            for age_s, kept in found:
                if kept.key not in self._forgotten:
                    began_again = kept.key in self._waiting or kept.key in self._writing
                    late = self._earlier if began_again else self.late
                    late[kept.key] = self._clock() - age_s, kept

    def _whole(self, used_at: float, kept: SessionRecord) -> tuple[float, SessionRecord]:
        """As the row is to be: after the session of its key that was read late."""
        with self._guard:
            if (found := self._earlier.get(kept.key)) is not None:
                _, earlier = found
                self._earlier[kept.key] = used_at, earlier
                kept = kept.after(earlier)
        return used_at, kept

    def _drop_late(self) -> None:
        """Those that have expired."""
        since = self._clock() - self.rows.ttl_s
        with self._guard:
            for late in (self.late, self._earlier):
                for key in [key for key, (used_at, _) in late.items() if used_at < since]:
                    del late[key]
