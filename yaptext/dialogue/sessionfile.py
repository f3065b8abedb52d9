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

import fcntl
import hashlib
import hmac
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from yaptext.dialogue.persona import Persona, styles
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import Message, Speaker
from yaptext.errors import BadMessage, SettingsError, StartError, YapError

if TYPE_CHECKING:
    from yaptext.dialogue.session import Session, SessionKey

_log = structlog.get_logger(__name__)
_APPLICATION_ID = 0x59617031
"""Marks a database as ours, in this form of its table."""
_SCHEMA = f"""
PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=ON; PRAGMA application_id={_APPLICATION_ID};
CREATE TABLE IF NOT EXISTS session (id BLOB PRIMARY KEY, used_at REAL NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON session (used_at);
"""
_HEADERS = (b"", b"SQLite format 3")
"""What a file of ours begins with, also one whose beginning was zeroed."""
_GATHER_S, _RETRY_S, _SWEEP_S = 0.5, 5.0, 60.0
"""What changes within the first goes into one write; a failed one is tried again; what has expired is deleted."""
_CLOCK_STEP_S = 1.0
_VERSION = 1
"""Of a body, to be raised when its form changes: one that tells none is of version 1."""
_OF_THE_DISK = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)
"""What SQLite says if it cannot write what it wants beside a file that it reads."""
_OF_ONE_ROW = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError)
"""What SQLite says of a row; its other errors are the file's."""


class _OtherVersion(Exception):
    """A body in a form that this version cannot write back whole."""


class _Form(msgspec.Struct, frozen=True):
    """As much of a body as every version reads."""

    version: int = 1


class Kept(msgspec.Struct, frozen=True):
    """What is kept of one session."""

    key: tuple[str, str]
    persona: Persona
    seed: int
    turns: int
    messages: list[tuple[Speaker, str]]
    tools: Sequence[dict[str, Any]] | None
    version: int = _VERSION

    @classmethod
    def of(cls, session: Session) -> Kept:
        said = [(message.speaker, message.text) for message in session.transcript.messages]
        tools = session.tools.given if session.tools is not None else None
        return cls(session.key, session.persona, session.seed, session.turns, said, tools)

    def after(self, earlier: Kept) -> Kept:
        """Both as one: the transcript of `earlier`, then this one's; persona and tools are this one's if it has any."""
        return msgspec.structs.replace(
            self,
            persona=earlier.persona if self.persona == Persona() else self.persona,
            turns=earlier.turns + self.turns,
            messages=[*earlier.messages, *self.messages],
            tools=earlier.tools if self.tools is None else self.tools,
        )

    def fill(self, session: Session) -> None:
        """Makes a new session what the kept one was, less a style or tools that this version does not know."""
        known = self.persona.style in styles()
        session.persona = self.persona if known else replace(self.persona, style=None)
        session.seed, session.turns = self.seed, self.turns
        session.transcript.messages = [Message(speaker, text) for speaker, text in self.messages]
        with suppress(BadMessage):
            session.tools = None if self.tools is None else _tool_set(msgspec.json.encode(self.tools))


@lru_cache
def _tool_set(tools: bytes) -> ToolSet:
    """Thousands of sessions may have the same few lists."""
    return ToolSet(msgspec.json.decode(tools))


@dataclass(slots=True)
class _Late:
    """A session that was read after `load`."""

    used_at: float
    kept: Kept
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
        self._path, self._seal = path, _Seal(secret)
        self._max, self._ttl_s, self._clock, self._wall = max_sessions, ttl_s, clock, wall
        self._wall_offset = wall() - clock()
        self._guard = threading.Lock()
        self._waiting: dict[SessionKey, tuple[float, Kept]] = {}
        self._writing: Mapping[SessionKey, tuple[float, Kept]] = {}
        self._forgotten: dict[SessionKey, Future[None]] = {}
        self._left_out: dict[SessionKey, None] = {}
        """Sessions whose last state is no row. A later state may be one."""
        self._ours: set[bytes] = set()
        """Ids of rows that this version may replace: looked at, or written by itself."""
        self._unread = True
        """Rows may be there that nobody has read."""
        self._late: dict[SessionKey, _Late] = {}
        self._failure: str | None = None
        self._sweep_at = 0.0
        self._lock: int | None = None
        self._database: sqlite3.Connection | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)

    @property
    def failing(self) -> bool:
        """The last write or the load went wrong, or nothing writes any more: a restart would not find what has changed
        since."""
        return self.trouble is not None

    @property
    def trouble(self) -> str | None:
        """`failing` in a sentence."""
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stop.is_set():
            return f"Sessions are no longer saved in {self._path}: the log has the reason (sessions.writer_died)."
        return self._failure

    def load(self) -> list[tuple[float, Kept]]:
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
            _log.error(
                "sessions.not_read",
                file=str(self._path),
                error=str(error),
                hint="until it can be read, clients do not find its sessions, and nothing in it is replaced; reading "
                "is tried again, and what is said meanwhile waits in memory",
            )
            self._failure = f"Sessions cannot be read from {self._path}: {error}."
            return []
        self._unread = False
        return found

    def start(self) -> None:
        """Begins to write. After the engines' processes are there: they should not inherit a thread's state."""
        self._thread.start()

    def put(self, session: Session) -> None:
        """Has the session written soon, as it is now. Never waits for the disk."""
        kept = (session.used_at, Kept.of(session))
        with self._guard:
            self._waiting.pop(session.key, None)
            self._waiting[session.key] = kept
            if len(self._waiting) > self._max:
                del self._waiting[next(iter(self._waiting))]

    def take(self, key: SessionKey) -> tuple[float, Kept] | None:
        """A session that could only be read after `load`, and when it was last used. Asked for each key that is not in
        memory; there is an answer once. Never waits for the disk."""
        with self._guard:
            late = self._late.get(key)
            if late is None or late.joined:
                return None
            del self._late[key]
            return late.used_at, late.kept

    def forget(self, key: SessionKey) -> Future[None]:
        """Has a session deleted; the future is done when nothing of it can be read in the file. Never waits."""
        with self._guard:
            self._waiting.pop(key, None)
            self._late.pop(key, None)
            return self._forgotten.setdefault(key, Future())

    def close(self, timeout_s: float) -> None:
        """Writes what waits, within the time; tells how many sessions could not be. Blocks."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        lost = len({*self._waiting, *self._writing, *self._left_out})
        if lost:
            _log.error("sessions.lost", file=str(self._path), sessions=lost)
        if self._lock is not None and not self._thread.is_alive():
            os.close(self._lock)
            self._lock = None

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._stop.wait(_RETRY_S if self._failure else _GATHER_S):
                self._write()
            self._sweep_at = 0.0
            self._write()
        except BaseException as error:  # `_write` lives through every `Exception` of a write
            _log.error(
                "sessions.writer_died",
                file=str(self._path),
                error=type(error).__name__,
                hint="conversations go on and are not kept any more; restart the service",
            )
        finally:
            if self._database is not None:
                self._database.close()

    def _write(self) -> None:
        with self._guard:
            self._writing, self._waiting = self._waiting, {}
            forgotten = dict(self._forgotten)
        due = self._clock() >= self._sweep_at or bool(forgotten)
        if not self._writing and not due:
            return
        try:
            if self._unread:
                self._read_late()
            if self._database is None:
                self._database = self._connect()
            elif not self._path.exists():
                raise FileNotFoundError(f"{self._path} was removed")
            self._save(self._database, forgotten)
            if due:  # also from the log of writes nothing deleted can be read
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._drop_late()
                self._sweep_at = self._clock() + _SWEEP_S
            with self._guard:
                for key, done in forgotten.items():
                    self._forgotten.pop(key, None)
                    if done.set_running_or_notify_cancel():
                        done.set_result(None)
        except Exception as error:  # also one that nobody thought of: what waits is tried again
            if self._database is not None:
                self._database.close()
                self._database = None
            with self._guard:
                again = {key: kept for key, kept in self._writing.items() if key not in self._forgotten}
                self._waiting = {**again, **self._waiting}
            self._fail(error)
        else:
            if self._failure:
                _log.info("sessions.saved", file=str(self._path), sessions=len(self._writing))
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
            database.execute("DELETE FROM session WHERE id = ?", (self._seal.id(key),))
            self._left_out.pop(key, None)
        for used_at, kept in self._writing.values():
            self._save_row(database, used_at, kept)
        self._purge(database)
        database.execute("COMMIT")

    def _save_row(self, database: sqlite3.Connection, used_at: float, kept: Kept) -> None:
        """Leaves a session out that cannot be a row, so that it holds up nobody else's. Raises what is of the file."""
        with self._guard:
            if late := self._late.get(kept.key):
                late.joined, late.used_at = True, used_at
                kept = kept.after(late.kept)
        id = self._seal.id(kept.key)
        try:
            self._check_ours(database, id)
            row = (id, used_at + self._wall_offset, self._seal.close(id, kept))
            database.execute("INSERT OR REPLACE INTO session VALUES (?, ?, ?)", row)
        except Exception as error:
            if isinstance(error, (OSError, sqlite3.Error)) and not isinstance(error, _OF_ONE_ROW):
                raise
            self._leave_out(kept.key, id, error)
        else:
            self._left_out.pop(kept.key, None)

    def _check_ours(self, database: sqlite3.Connection, id: bytes) -> None:
        """Raises `_OtherVersion` for a row that another version may read and this one would cut short."""
        if id in self._ours:
            return
        found = database.execute("SELECT body FROM session WHERE id = ?", (id,)).fetchone()
        if found is not None:
            try:
                self._seal.open(id, found[0])
            except _OtherVersion:
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
        other = isinstance(error, _OtherVersion)
        _log.warning(
            "session.left_out",
            file=str(self._path),
            key=key[0],
            row=id.hex()[:16],
            error="the row is of another version" if other else type(error).__name__,
            hint="it goes on in memory; a restart finds it as it was last written",
        )
        self._left_out[key] = None
        if len(self._left_out) > self._max:
            del self._left_out[next(iter(self._left_out))]

    def _purge(self, database: sqlite3.Connection) -> None:
        oldest = self._now() - self._ttl_s
        database.execute("DELETE FROM session WHERE used_at < ?", (oldest,))
        over = "SELECT id FROM session ORDER BY used_at DESC LIMIT -1 OFFSET ?"
        database.execute(f"DELETE FROM session WHERE id IN ({over})", (self._max,))

    def _fail(self, error: Exception) -> None:
        known = isinstance(error, (OSError, sqlite3.Error, YapError))
        said = str(error) if known else type(error).__name__  # the words of others may quote what was said
        if not self._failure:
            _log.warning(
                "sessions.unsaved",
                file=str(self._path),
                error=said,
                sessions=len(self._waiting),
                hint="conversations go on; a restart before it can be written again would forget what changes",
            )
        self._failure = f"Sessions are not saved in {self._path}: {said}."

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
        named = of_setting(self._path)
        with closing(open_to_read(self._path, named)) as database:
            rows = self._rows(database) if has_table(database, named) else []
        self._fail(refused)
        return rows

    def _rows(self, database: sqlite3.Connection) -> list[tuple[bytes, float, bytes]]:
        """Within the bounds of number and age, which a file that cannot be written may be over."""
        question = "SELECT id, used_at, body FROM session WHERE used_at >= ? ORDER BY used_at DESC LIMIT ?"
        return database.execute(question, (self._now() - self._ttl_s, self._max)).fetchall()[::-1]

    def _decode(self, rows: Sequence[tuple[bytes, float, bytes]]) -> list[tuple[float, Kept]]:
        """Each with the seconds since its last use. One line says how many, another how many cannot be read."""
        found, of_other_versions = [], 0
        for id, used_at, body in rows:
            try:
                found.append((max(0.0, self._now() - used_at), self._seal.open(id, body)))
            except _OtherVersion:
                of_other_versions += 1
            except Exception:  # InvalidTag of a library that is not imported here, and errors of the decoder
                continue
        _log.info("sessions.restored", file=str(self._path), sessions=len(found))
        if unread := len(rows) - len(found):
            _log.warning(
                "sessions.unreadable",
                file=str(self._path),
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
                    self._late[kept.key] = _Late(self._clock() - age_s, kept, joined)
        self._unread = False

    def _drop_late(self) -> None:
        """Those that have expired."""
        since = self._clock() - self._ttl_s
        with self._guard:
            self._late = {key: late for key, late in self._late.items() if late.used_at >= since}

    def _now(self) -> float:
        """The time of day as rows have it."""
        return self._clock() + self._wall_offset

    def _is_missing(self) -> bool:
        try:
            self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # it may be there
            return False
        return False

    # --- the file

    def _connect(self) -> sqlite3.Connection:
        """The database, made where there is none; a damaged one is moved aside."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._path.exists():
            _check_header(self._path, of_setting(self._path))
        if self._lock is None:
            self._lock = hold(self._path)
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none: of our own check
            if code & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise
        aside = move_aside(self._path, f"damaged-{int(self._wall())}")
        _log.error("sessions.damaged", file=str(self._path), moved_to=aside, hint="begun anew, without what was kept")
        return self._open()

    def _open(self) -> sqlite3.Connection:
        self._path.touch(0o600)
        database = sqlite3.connect(self._path, timeout=1, isolation_level=None)
        try:
            has_table(database, of_setting(self._path))
            (health,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if health != "ok":
                raise sqlite3.DatabaseError(health)
            self._path.chmod(0o600)
            database.executescript(_SCHEMA)
            # From before the clock was set back: as if used now.
            database.execute("UPDATE session SET used_at = ?1 WHERE used_at > ?1", (self._now(),))
            self._purge(database)
        except BaseException:
            database.close()
            raise
        return database


def of_setting(path: Path) -> str:
    """What errors call the session file."""
    return f"SESSION_STORE={str(path)!r}"


def _check_header(path: Path, named: str) -> None:
    if not path.is_file():  # a FIFO would never open
        raise SettingsError(f"{named} is not allowed: it is no regular file")
    with path.open("rb") as file:
        if file.read(16).strip(b"\0") not in _HEADERS:
            raise SettingsError(f"{named} is not allowed: it is no database. Move it away, or name another file")


def has_table(database: sqlite3.Connection, named: str) -> bool:
    """False for a database that is empty yet. Raises `SettingsError` for another one than a session file."""
    (owner,), (tables,) = (
        database.execute(question).fetchone()
        for question in ("PRAGMA application_id", "SELECT count(*) FROM sqlite_schema")
    )
    if tables and owner != _APPLICATION_ID:
        raise SettingsError(
            f"{named} is not allowed: it is another program's database. Move it away, or name another file"
        )
    return bool(tables)


def open_to_read(path: Path, named: str) -> sqlite3.Connection:
    """A database with what its log of writes holds, while another process writes it, and on a disk that takes no byte.
    Raises `SettingsError` for what is no database, and what the system says.

    Beside a file with a log SQLite wants shared memory, and makes it if it can. It reads a log without writing there
    (`readonly_shm`) if the file of it exists. Where there is no log, nothing is needed (`immutable`): the process that
    writes would have one. https://www.sqlite.org/wal.html#read_only_databases
    """
    _check_header(path, named)
    log = Path(f"{path}-wal")
    refused: sqlite3.Error | None = None
    for options in ("mode=ro", "mode=ro&readonly_shm=1", "mode=ro&immutable=1"):
        if "immutable" in options and log.exists() and log.stat().st_size:  # SQLite itself may have made an empty one
            break
        database = None
        try:
            uri = f"{path.absolute().as_uri()}?{options}"
            database = sqlite3.connect(uri, uri=True, timeout=1, isolation_level=None)
            database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            return database
        except BaseException as error:
            if database is not None:
                database.close()
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if not isinstance(error, sqlite3.Error) or code not in _OF_THE_DISK:
                raise
            refused = refused or error
    assert refused is not None
    raise refused


def hold(path: Path) -> int:
    """Takes the file for this process until the descriptor is closed. Raises `StartError` if another process holds it.
    The lock is none that the engines' processes inherit."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        who = os.read(lock, 20).decode(errors="replace")
        os.close(lock)
        if isinstance(error, BlockingIOError):
            process = f"process {who}" if who else "another process"
            raise StartError(f"{of_setting(path)} is in use by {process}") from None
        raise
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(lock, os.write(lock, str(os.getpid()).encode()))  # in that order: in place, it needs no room
    return lock


def move_aside(path: Path, suffix: str) -> str:
    """Renames the file, and what SQLite has beside it, to `PATH.SUFFIX`, or if that exists to `PATH.SUFFIX-2` and so
    on. Returns the name."""
    aside, number = f"{path}.{suffix}", 1
    while os.path.lexists(aside):
        number += 1
        aside = f"{path}.{suffix}-{number}"
    for part in ("-wal", "-shm", ""):
        if os.path.exists(f"{path}{part}"):
            os.rename(f"{path}{part}", aside + part)
    return aside


class _Seal:
    """Ids and bodies of rows: with a secret unreadable and unchangeable without it (AES-256-GCM), else plain JSON."""

    def __init__(self, secret: str | None) -> None:
        self._cipher: Any = None
        self._id_key = b""
        if secret is not None:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            # Slow on purpose: a secret may be a sentence.
            keys = hashlib.scrypt(secret.encode(), salt=b"yap-text sessions", n=2**14, r=8, p=1, dklen=64)
            self._cipher, self._id_key = AESGCM(keys[:32]), keys[32:]

    def id(self, key: SessionKey) -> bytes:
        # Also of a name that is no text: it must not hold up the others' rows.
        return hmac.digest(self._id_key, "\0".join(key).encode(errors="surrogatepass"), "sha256")

    def close(self, id: bytes, kept: Kept) -> bytes:
        body = msgspec.json.encode(kept)
        if self._cipher is None:
            return body
        nonce = os.urandom(12)
        return nonce + bytes(self._cipher.encrypt(nonce, body, id))

    def open(self, id: bytes, body: bytes) -> Kept:
        """Raises `_OtherVersion` for a body in another form, and what the cipher or the decoder raises for one that was
        written under another secret, or is damaged."""
        if self._cipher is not None:
            body = self._cipher.decrypt(body[:12], body[12:], id)
        try:
            if msgspec.json.decode(body, type=_Form).version > _VERSION:
                raise _OtherVersion
            return msgspec.json.decode(body, type=Kept)
        except msgspec.ValidationError as error:  # whole JSON, with other fields
            raise _OtherVersion from error
