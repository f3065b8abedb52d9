"""Shows, backs up and restores the session file. Rows are copied as they are, sealed or not."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from yaptext.errors import SettingsError, StartError, YapError
from yaptext.settings import Settings
from yaptext.store.sqlite_file import has_table, hold, move_aside, of_setting, open_to_read


def show(settings: Settings) -> int:
    """Prints the file, its sessions, its bytes, and the oldest and the latest use. A service may use the file."""
    path = _path(settings)
    with _open(path, of_setting(path)) as database:
        sessions, oldest, latest = 0, None, None
        if has_table(database, of_setting(path)):
            question = "SELECT count(*), min(used_at), max(used_at) FROM session"
            sessions, oldest, latest = database.execute(question).fetchone()
    print(f"file: {path}")
    print(f"sessions: {sessions}")
    print(f"bytes: {_size(path) + _size(Path(f'{path}-wal'))}")
    print(f"oldest use: {_time(oldest)}")
    print(f"latest use: {_time(latest)}")
    return 0


def back_up(settings: Settings, to: Path) -> int:
    """Makes `to`, mode 0600, with every session that is in the file now; a service may write to it. Raises
    `SettingsError` if `to` exists; an incomplete copy is removed."""
    path = _path(settings)
    with _open(path, of_setting(path)) as database:
        if not has_table(database, of_setting(path)):
            raise YapError(f"{of_setting(path)} is still empty: there is nothing to back up")
        _make(to)
        sessions = _copy(database, of_setting(path), to)
    print(f"copied {_counted(sessions)} into {to}")
    return 0


def restore(settings: Settings, source: Path) -> int:
    """Restores the sessions of `source`. The previous file is kept beside it. Raises `StartError` while a service uses
    the file, `SettingsError` if `source` is not a backup."""
    path = _path(settings)
    named = f"FILE={str(source)!r}"
    with _open(source, named) as database:
        if not has_table(database, named):
            raise SettingsError(f"{named} is not allowed: it is an empty database")
        with _told(f"{path} cannot be written"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                lock = hold(path)
            except StartError as error:
                raise StartError(f"{error}; stop it first") from None
        try:
            sessions, aside = _replace(path, database, named)
            expired = _expired(path, settings.session_ttl_s)
        finally:
            os.close(lock)
    line = f"restored {_counted(sessions)} into {path}"
    if expired:
        ttl = f"SESSION_TTL_S={settings.session_ttl_s:g}"
        line += f", {expired} of them unused for longer than {ttl}: a start deletes them"
    print(f"{line}; the previous file is {aside}" if aside else f"{line}; there was no previous file")
    return 0


def _path(settings: Settings) -> Path:
    if settings.session_file is None:
        raise SettingsError("SESSION_STORE='memory' has no session file: set the sqlite:PATH of the service")
    return settings.session_file


@contextmanager
def _told(what: str) -> Iterator[None]:
    """The system's error in one line."""
    try:
        yield
    except OSError as error:
        raise YapError(f"{what}: {error.strerror or error}") from None
    except sqlite3.Error as error:
        raise YapError(f"{what}: {error}") from None


@contextmanager
def _open(path: Path, named: str) -> Iterator[sqlite3.Connection]:
    with _told(f"{named} cannot be read"):
        if not path.exists():
            raise YapError(f"{named} does not exist")
        database = open_to_read(path, named)
    with closing(database), _told(f"{named} cannot be read"):
        yield database


def _make(file: Path) -> None:
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise SettingsError(f"FILE={str(file)!r} is not allowed: it exists; name a new one") from None
    except OSError as error:
        raise YapError(f"FILE={str(file)!r} cannot be written: {error.strerror}") from None


def _copy(database: sqlite3.Connection, named: str, to: Path) -> int:
    """SQLite's own backup into an empty file, which then needs no other beside it. Returns how many sessions it has.
    Raises `YapError` if the database, which errors call `named`, is damaged."""
    try:
        with _told(f"{to} cannot be written"), closing(sqlite3.connect(to, isolation_level=None)) as copy:
            database.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # on a read-only disk there can be no log
            (health,) = copy.execute("PRAGMA quick_check(1)").fetchone()
            if health != "ok":
                raise YapError(f"{named} is damaged: {health.splitlines()[-1]}")
            (sessions,) = copy.execute("SELECT count(*) FROM session").fetchone()
            return int(sessions)
    except BaseException:
        for part in ("-journal", "-wal", "-shm", ""):
            with suppress(OSError):
                os.unlink(f"{to}{part}")
        raise


def _replace(path: Path, database: sqlite3.Connection, named: str) -> tuple[int, str | None]:
    """Returns the number of sessions, and the path of the previous file."""
    new = path.with_name(f"{path.name}.restored")
    new.unlink(missing_ok=True)  # left by a restore that was killed
    _make(new)
    sessions = _copy(database, named, new)
    with _told(f"{path} cannot be written"):
        _give(path, new)
        before = path.exists()
        aside = move_aside(path, f"replaced-{int(time.time())}")  # also a log alone: it would be read into the new file
        os.rename(new, path)
    return sessions, aside if before else None


def _give(path: Path, new: Path) -> None:
    """Gives a file that root made to the owner of the old file or of the folder: the service does not run as root."""
    if os.geteuid() == 0:
        owner = (path if path.exists() else path.parent).stat()
        for file in (new, Path(f"{path}.lock")):
            os.chown(file, owner.st_uid, owner.st_gid)


def _expired(path: Path, ttl_s: float) -> int:
    with closing(open_to_read(path, of_setting(path))) as database:
        question = "SELECT count(*) FROM session WHERE used_at < ?"
        (expired,) = database.execute(question, (time.time() - ttl_s,)).fetchone()
    return int(expired)


def _counted(sessions: int) -> str:
    return "1 session" if sessions == 1 else f"{sessions} sessions"


def _size(file: Path) -> int:
    with suppress(OSError):  # the log may have been deleted meanwhile
        return file.stat().st_size
    return 0


def _time(used_at: float | None) -> str:
    return "none" if used_at is None else datetime.fromtimestamp(used_at, UTC).isoformat(timespec="seconds")
