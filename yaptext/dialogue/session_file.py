"""The session file: sessions in SQLite, written behind the turns and read by the next start.

No turn waits for it: `put` leaves a copy, and one thread writes what has changed. Rows are found by a hash, and with a
key nothing in them can be read. What the disk refuses is told in one line, kept in memory and tried again. A session
that cannot be a row is left out, alone; what a newer version wrote is never replaced.

A disk that is full or read-only is read all the same. Until the file was read, no row of it is replaced: what changes
waits in memory, and reading is tried again before each write. Sessions that are read late come back when their clients
do. If a session of the same key began before that, memory keeps the new one, and its row is both: the old transcript,
then the new one.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import structlog

from yaptext.dialogue.seal import Seal
from yaptext.dialogue.session import Session, SessionKey
from yaptext.dialogue.session_database import (
    SCHEMA,
    check_header,
    has_table,
    hold,
    move_aside,
    of_setting,
    open_to_read,
)
from yaptext.dialogue.session_record import OtherVersion, SessionRecord
from yaptext.errors import YapError

log = structlog.get_logger(__name__)
_GATHER_S, RETRY_S, _SWEEP_S = 0.5, 5.0, 60.0
"""What changes within the first goes into one write; a failed one is tried again; what has expired is deleted."""
_CLOCK_STEP_S = 1.0
_OF_ONE_ROW = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError)
"""What SQLite says of a row; its other errors are the file's."""


@dataclass(slots=True)
class _Late:
    """A session that was read after `load`."""

    used_at: float
    kept: SessionRecord
    joined: bool = False
    """A session of its key began before it was read. Each row of that one begins with this."""


class SessionFile:
    """One file, held by one process. `load` once, then `start`, `put` and `take` at will, and `close`."""

    def __init__(
        self,
        path: Path,
        secret: str | None,
        *,
        max_sessions: int,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.seal = path, Seal(secret)
        self._max, self._ttl_s, self._clock, self._wall = max_sessions, ttl_s, clock, wall
        self._wall_offset = wall() - clock()
        self._guard = threading.Lock()
        self._waiting: dict[SessionKey, tuple[float, SessionRecord]] = {}
        self._writing: Mapping[SessionKey, tuple[float, SessionRecord]] = {}
        self._forgotten: dict[SessionKey, Future[None]] = {}
        self._left_out: dict[SessionKey, None] = {}
        """Sessions whose last state is no row. A later state may be one."""
        self._ours: set[bytes] = set()
        """Ids of rows that this version may replace: looked at, or written by itself."""
        self._unread = True
        """Rows may be there that nobody has read."""
        self.late: dict[SessionKey, _Late] = {}
        self._failure: str | None = None
        self._sweep_at = 0.0
        self.lock: int | None = None
        self.database: sqlite3.Connection | None = None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name="sessions", daemon=True)

    @property
    def failing(self) -> bool:
        """The last write or the load went wrong, or nothing writes any more: a restart would not find what has changed
        since."""
        return self.trouble is not None

    @property
    def trouble(self) -> str | None:
        """`failing` in a sentence."""
        if self.thread.ident is not None and not self.thread.is_alive() and not self.stopping.is_set():
            return f"Sessions are no longer saved in {self.path}: the log has the reason (sessions.writer_died)."
        return self._failure

    def load(self) -> list[tuple[float, SessionRecord]]:
        """What was kept, each with the seconds since its last use, oldest first. Blocks.

        Raises `SettingsError` for a file that is something else, `StartError` where another process holds it. What the
        system refuses is no error: it is tried later. Sessions that could not be read now come by `take`.
        """
        try:
            found = self._decode(self._read())
        except (OSError, sqlite3.Error) as error:
            if self._is_missing():
                self._fail(error)
                return []
            log.error(
                "sessions.not_read",
                file=str(self.path),
                error=str(error),
                hint="until it can be read, clients do not find its sessions, and nothing in it is replaced; reading "
                "is tried again, and what is said meanwhile waits in memory",
            )
            self._failure = f"Sessions cannot be read from {self.path}: {error}."
            return []
        self._unread = False
        return found

    def start(self) -> None:
        """Begins to write. After the engines' processes are there: they should not inherit a thread's state."""
        self.thread.start()

    def put(self, session: Session) -> None:
        """Has the session written soon, as it is now. Never waits for the disk."""
        kept = (session.used_at, SessionRecord.of(session))
        with self._guard:
            self._waiting.pop(session.key, None)
            self._waiting[session.key] = kept
            if len(self._waiting) > self._max:
                del self._waiting[next(iter(self._waiting))]

    def take(self, key: SessionKey) -> tuple[float, SessionRecord] | None:
        """A session that could only be read after `load`, and when it was last used. Asked for each key that is not in
        memory; there is an answer once. Never waits for the disk."""
        with self._guard:
            late = self.late.get(key)
            if late is None or late.joined:
                return None
            del self.late[key]
            return late.used_at, late.kept

    def forget(self, key: SessionKey) -> Future[None]:
        """Has a session deleted; the future is done when nothing of it can be read in the file. Never waits."""
        with self._guard:
            self._waiting.pop(key, None)
            self.late.pop(key, None)
            return self._forgotten.setdefault(key, Future())

    def close(self, timeout_s: float) -> None:
        """Writes what waits, within the time; tells how many sessions could not be. Blocks."""
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join(timeout_s)
        lost = len({*self._waiting, *self._writing, *self._left_out})
        if lost:
            log.error("sessions.lost", file=str(self.path), sessions=lost)
        if self.lock is not None and not self.thread.is_alive():
            os.close(self.lock)
            self.lock = None

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
                file=str(self.path),
                error=type(error).__name__,
                hint="conversations go on and are not kept any more; restart the service",
            )
        finally:
            if self.database is not None:
                self.database.close()

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
            if self.database is None:
                self.database = self._connect()
            elif not self.path.exists():
                raise FileNotFoundError(f"{self.path} was removed")
            self._save(self.database, forgotten)
            if due:  # also from the log of writes nothing deleted can be read
                self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._drop_late()
                self._sweep_at = self._clock() + _SWEEP_S
            with self._guard:
                for key, done in forgotten.items():
                    self._forgotten.pop(key, None)
                    if done.set_running_or_notify_cancel():
                        done.set_result(None)
        except Exception as error:  # also one that nobody thought of: what waits is tried again
            if self.database is not None:
                self.database.close()
                self.database = None
            with self._guard:
                again = {key: kept for key, kept in self._writing.items() if key not in self._forgotten}
                self._waiting = {**again, **self._waiting}
            self._fail(error)
        else:
            if self._failure:
                log.info("sessions.saved", file=str(self.path), sessions=len(self._writing))
            self._failure = None
        self._writing = {}

    def _save(self, database: sqlite3.Connection, forgotten: Iterable[SessionKey]) -> None:
        """One transaction: what has changed, what is forgotten, and the bounds of number and age."""
        step = self._wall() - self._clock() - self._wall_offset
        database.execute("BEGIN IMMEDIATE")
        if abs(step) > _CLOCK_STEP_S:  # the clock was set, or the machine slept: nobody's session is older for that
            self._wall_offset += step
            database.execute("UPDATE session SET used_at = used_at + ?", (step,))
        for key in forgotten:
            database.execute("DELETE FROM session WHERE id = ?", (self.seal.id(key),))
            self._left_out.pop(key, None)
        for used_at, kept in self._writing.values():
            self._save_row(database, used_at, kept)
        self.purge(database)
        database.execute("COMMIT")

    def _save_row(self, database: sqlite3.Connection, used_at: float, kept: SessionRecord) -> None:
        """Leaves a session out that cannot be a row, so that it holds up nobody else's. Raises what is of the file."""
        with self._guard:
            if late := self.late.get(kept.key):
                late.joined, late.used_at = True, used_at
                kept = kept.after(late.kept)
        id = self.seal.id(kept.key)
        try:
            self._check_ours(database, id)
            row = (id, used_at + self._wall_offset, self.seal.close(id, kept))
            database.execute("INSERT OR REPLACE INTO session VALUES (?, ?, ?)", row)
        except Exception as error:
            if isinstance(error, (OSError, sqlite3.Error)) and not isinstance(error, _OF_ONE_ROW):
                raise
            self._leave_out(kept.key, id, error)
        else:
            self._left_out.pop(kept.key, None)

    def _check_ours(self, database: sqlite3.Connection, id: bytes) -> None:
        """Raises `OtherVersion` for a row that another version may read and this one would cut short."""
        if id in self._ours:
            return
        found = database.execute("SELECT body FROM session WHERE id = ?", (id,)).fetchone()
        if found is not None:
            try:
                self.seal.open(id, found[0])
            except OtherVersion:
                raise
            except Exception:  # damaged: nobody will read it
                pass
        if len(self._ours) >= 2 * self._max:
            self._ours.clear()
        self._ours.add(id)

    def _leave_out(self, key: SessionKey, id: bytes, error: Exception) -> None:
        """One line for each session, with nothing of what it holds."""
        if key in self._left_out:
            return
        other = isinstance(error, OtherVersion)
        log.warning(
            "session.left_out",
            file=str(self.path),
            key=key[0],
            row=id.hex()[:16],
            error="the row is of another version" if other else type(error).__name__,
            hint="it goes on in memory; a restart finds it as it was last written",
        )
        self._left_out[key] = None
        if len(self._left_out) > self._max:
            del self._left_out[next(iter(self._left_out))]

    def purge(self, database: sqlite3.Connection) -> None:
        oldest = self._now() - self._ttl_s
        database.execute("DELETE FROM session WHERE used_at < ?", (oldest,))
        over = "SELECT id FROM session ORDER BY used_at DESC LIMIT -1 OFFSET ?"
        database.execute(f"DELETE FROM session WHERE id IN ({over})", (self._max,))

    def _fail(self, error: Exception) -> None:
        known = isinstance(error, (OSError, sqlite3.Error, YapError))
        said = str(error) if known else type(error).__name__  # the words of others may quote what was said
        if not self._failure:
            log.warning(
                "sessions.unsaved",
                file=str(self.path),
                error=said,
                sessions=len(self._waiting),
                hint="conversations go on; a restart before it can be written again would forget what changes",
            )
        self._failure = f"Sessions are not saved in {self.path}: {said}."

    # --- reading

    def _read(self) -> list[tuple[bytes, float, bytes]]:
        """The rows, oldest first, also of a file that cannot be written. Raises what the system says of one that cannot
        be read either."""
        try:
            with closing(self._connect()) as database:
                return self._rows(database)
        except (OSError, sqlite3.Error) as error:
            if self._is_missing():
                raise
            refused = error
        named = of_setting(self.path)
        with closing(open_to_read(self.path, named)) as database:
            rows = self._rows(database) if has_table(database, named) else []
        self._fail(refused)
        return rows

    def _rows(self, database: sqlite3.Connection) -> list[tuple[bytes, float, bytes]]:
        """Within the bounds of number and age, which a file that cannot be written may be over."""
        question = "SELECT id, used_at, body FROM session WHERE used_at >= ? ORDER BY used_at DESC LIMIT ?"
        return database.execute(question, (self._now() - self._ttl_s, self._max)).fetchall()[::-1]

    def _decode(self, rows: Sequence[tuple[bytes, float, bytes]]) -> list[tuple[float, SessionRecord]]:
        """Each with the seconds since its last use. One line says how many, another how many cannot be read."""
        found, of_other_versions = [], 0
        for id, used_at, body in rows:
            try:
                found.append((max(0.0, self._now() - used_at), self.seal.open(id, body)))
            except OtherVersion:
                of_other_versions += 1
            except Exception:  # InvalidTag of a library that is not imported here, and errors of the decoder
                continue
        log.info("sessions.restored", file=str(self.path), sessions=len(found))
        if unread := len(rows) - len(found):
            log.warning(
                "sessions.unreadable",
                file=str(self.path),
                sessions=unread,
                of_other_versions=of_other_versions,
                hint="written under another SESSION_STORE_KEY, or by another version; they stay until they expire",
            )
        return found

    def _read_late(self) -> None:
        """What `load` could not read, for `take`. A session that has changed since is another one of the same key."""
        found = self._decode(self._read())
        with self._guard:
            for age_s, kept in found:
                if kept.key not in self._forgotten:
                    joined = kept.key in self._waiting or kept.key in self._writing
                    self.late[kept.key] = _Late(self._clock() - age_s, kept, joined)
        self._unread = False

    def _drop_late(self) -> None:
        """Those that have expired."""
        since = self._clock() - self._ttl_s
        with self._guard:
            self.late = {key: late for key, late in self.late.items() if late.used_at >= since}

    def _now(self) -> float:
        """The time of day as rows have it."""
        return self._clock() + self._wall_offset

    def _is_missing(self) -> bool:
        try:
            self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # it may be there
            return False
        return False

    # --- the file

    def _connect(self) -> sqlite3.Connection:
        """The database, made where there is none; a damaged one is moved aside."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.exists():
            check_header(self.path, of_setting(self.path))
        if self.lock is None:
            self.lock = hold(self.path)
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none: of our own check
            if code & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise
        aside = move_aside(self.path, f"damaged-{int(self._wall())}")
        log.error("sessions.damaged", file=str(self.path), moved_to=aside, hint="begun anew, without what was kept")
        return self._open()

    def _open(self) -> sqlite3.Connection:
        self.path.touch(0o600)
        database = sqlite3.connect(self.path, timeout=1, isolation_level=None)
        try:
            has_table(database, of_setting(self.path))
            (health,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if health != "ok":
                raise sqlite3.DatabaseError(health)
            self.path.chmod(0o600)
            database.executescript(SCHEMA)
            # From before the clock was set back: as if used now.
            database.execute("UPDATE session SET used_at = ?1 WHERE used_at > ?1", (self._now(),))
            self.purge(database)
        except BaseException:
            database.close()
            raise
        return database
