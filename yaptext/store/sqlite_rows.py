"""The rows of the session file: sealed, found by a hash, bounded by number or age."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import structlog
from cachetools import LRUCache

from yaptext.store.base import OtherVersion, SessionKey, SessionRecord
from yaptext.store.seal import Seal
from yaptext.store.sqlite_file import SCHEMA, check_header, has_table, hold, move_aside, of_setting, open_to_read

log = structlog.get_logger(__name__)
_CLOCK_STEP_S = 1.0
_OF_ONE_ROW = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError)
"""What SQLite says of a row; its other errors are the file's."""


class Rows:
    """The rows of one file, held by one process. Every method blocks; one thread at a time."""

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
        self.max_sessions, self.ttl_s, self.clock, self._wall = max_sessions, ttl_s, clock, wall
        self._wall_offset = wall() - clock()
        self.left_out: LRUCache[SessionKey, None] = LRUCache(max_sessions)
        """Sessions whose last state is no row. A later state may be one."""
        self._ours: LRUCache[bytes, None] = LRUCache(2 * max_sessions)
        """Ids of rows that this version may replace: looked at, or written by itself."""
        self.lock: int | None = None
        self.database: sqlite3.Connection | None = None

    def close(self) -> None:
        if self.database is not None:
            self.database.close()
            self.database = None

    def let_go(self) -> None:
        """Another process may have the file."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def read(self) -> tuple[list[tuple[float, SessionRecord]], Exception | None]:
        """Sessions with the seconds since their last use, oldest first. Of a file that cannot be written, also
        what the system says of that. Raises what it says of one that cannot be read either."""
        refused = None
        try:
            with closing(self._connect()) as database:
                rows = self._rows(database)
        except (OSError, sqlite3.Error) as error:
            if self.is_missing():
                raise
            refused = error
            named = of_setting(self.path)
            with closing(open_to_read(self.path, named)) as database:
                rows = self._rows(database) if has_table(database, named) else []
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
        return found, refused

    def _rows(self, database: sqlite3.Connection) -> list[tuple[bytes, float, bytes]]:
        """Within the bounds of number and age, which a file that cannot be written may be over."""
        question = "SELECT id, used_at, body FROM session WHERE used_at >= ? ORDER BY used_at DESC LIMIT ?"
        return database.execute(question, (self._now() - self.ttl_s, self.max_sessions)).fetchall()[::-1]

    def save(
        self, changed: Iterable[tuple[float, SessionRecord]], forgotten: Iterable[SessionKey], *, erase: bool
    ) -> None:
        """One transaction: what has changed, what is forgotten, and the bounds of number and age. `erase`: nothing that
        was deleted can be read then, also from the log of writes."""
        if self.database is None:
            self.database = self._connect()
        elif not self.path.exists():
            raise FileNotFoundError(f"{self.path} was removed")
        database = self.database
        step = self._wall() - self.clock() - self._wall_offset
        database.execute("BEGIN IMMEDIATE")
        if abs(step) > _CLOCK_STEP_S:  # the clock was set, or the machine slept: no session is older because of that
            self._wall_offset += step
            database.execute("UPDATE session SET used_at = used_at + ?", (step,))
        for key in forgotten:
            database.execute("DELETE FROM session WHERE id = ?", (self.seal.id(key),))
            self.left_out.pop(key, None)
        for used_at, kept in changed:
            self._save_row(database, used_at, kept)
        self.purge(database)
        database.execute("COMMIT")
        if erase:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _save_row(self, database: sqlite3.Connection, used_at: float, kept: SessionRecord) -> None:
        """Leaves out a session that cannot be a row, so that it blocks no other. Raises errors of the file."""
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
            self.left_out.pop(kept.key, None)

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
            except Exception:  # damaged: it cannot be read
                pass
        self._ours[id] = None

    def _leave_out(self, key: SessionKey, id: bytes, error: Exception) -> None:
        """One line for each session, with nothing of what it holds."""
        if key in self.left_out:
            return
        other = isinstance(error, OtherVersion)
        log.warning(
            "session.left_out",
            file=str(self.path),
            key=key[0],
            row=id.hex()[:16],
            error="the row is of another version" if other else type(error).__name__,
            hint="it stays in memory; a restart finds it as it was last written",
        )
        self.left_out[key] = None

    def purge(self, database: sqlite3.Connection) -> None:
        oldest = self._now() - self.ttl_s
        database.execute("DELETE FROM session WHERE used_at < ?", (oldest,))
        over = "SELECT id FROM session ORDER BY used_at DESC LIMIT -1 OFFSET ?"
        database.execute(f"DELETE FROM session WHERE id IN ({over})", (self.max_sessions,))

    def _now(self) -> float:
        """The time of day as rows have it."""
        return self.clock() + self._wall_offset

    def is_missing(self) -> bool:
        try:
            self.path.stat()
        except OSError as error:  # after another one it may be there
            return isinstance(error, (FileNotFoundError, NotADirectoryError))
        return False

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
        log.error(
            "sessions.damaged",
            file=str(self.path),
            moved_to=aside,
            hint="a new file was begun; the sessions of the old one are not loaded",
        )
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
