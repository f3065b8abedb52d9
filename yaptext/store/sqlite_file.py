"""The session file as the file system sees it: its owner, its holder, how SQLite reads it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from yaptext.errors import SettingsError, StartError

_APPLICATION_ID = 0x59617031
"""Marks a database as ours, in this form of its table."""
SCHEMA = f"""
PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=ON; PRAGMA application_id={_APPLICATION_ID};
CREATE TABLE IF NOT EXISTS session (id BLOB PRIMARY KEY, used_at REAL NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON session (used_at);
"""
_HEADERS = (b"", b"SQLite format 3")
"""What a file of ours begins with, also one whose beginning was zeroed."""
_OF_THE_DISK = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)
"""What SQLite says if it cannot write what it wants beside a file that it reads."""


def of_setting(path: Path) -> str:
    """What errors call the session file."""
    return f"SESSION_STORE={str(path)!r}"


def check_header(path: Path, named: str) -> None:
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
    check_header(path, named)
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
