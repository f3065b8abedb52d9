"""The sessions in memory, within their bounds."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from yaptext.dialogue.session import Session
from yaptext.dialogue.session_record import record_of, restored
from yaptext.settings import Settings
from yaptext.store.base import SessionKey, SessionRecord, Store
from yaptext.store.sqlite import SessionFile
from yaptext.store.sqlite_rows import Rows

_FLUSH_S = 5.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of sessions in memory: in all, and of one key."""

    sessions: int
    ttl_s: float
    bytes: int = 2**30
    key_sessions: int = 2**31
    key_bytes: int = 2**40

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        of_key = min(settings.max_sessions_per_key or settings.max_sessions, settings.max_sessions)
        mega = 2**20
        return cls(
            sessions=settings.max_sessions,
            bytes=settings.max_sessions_mb * mega,
            key_sessions=of_key,
            key_bytes=min(settings.max_sessions_mb_per_key or settings.max_sessions_mb, settings.max_sessions_mb)
            * mega,
            ttl_s=settings.session_ttl_s,
        )


@dataclass(slots=True)
class Held:
    """Sessions, least recently used first, and what they take in memory."""

    sessions: OrderedDict[SessionKey, Session] = field(default_factory=OrderedDict)
    bytes: int = 0

    def is_over(self, most: int, most_bytes: int) -> bool:
        return len(self.sessions) > most or self.bytes > most_bytes


class SessionStore:
    """Sessions by key, least recently used first. Bounded in number, bytes and idle time, in all and for each key; a
    session whose turn runs is never dropped. With a `file` a restart finds them again.

    Who goes over the bounds of a key loses the key's oldest. Over those of all, a key that has too much does, else
    the one that has most.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        clock: Callable[[], float] = time.monotonic,
        file: Store | None = None,
    ) -> None:
        self.bounds, self._clock, self._file = bounds, clock, file
        self.held = Held()
        self._sessions = self.held.sessions
        self.by_key: dict[str, Held] = {}
        for age_s, kept in file.load() if file is not None else ():
            self._restore(clock() - age_s, kept)

    @classmethod
    def of(cls, settings: Settings) -> SessionStore:
        """The store of `SESSION_STORE`, with what its file holds. Blocks. Raises as `Store.load` does."""
        path, secret, bounds = settings.session_file, settings.session_store_key, Bounds.of(settings)
        if path is None:
            return cls(bounds)
        secret_key = secret.get_secret_value() if secret else None
        rows = Rows(path, secret_key, max_sessions=bounds.sessions, ttl_s=bounds.ttl_s)
        return cls(bounds, file=SessionFile(rows))

    @property
    def file_failing(self) -> bool:
        """True while the file, where there is one, cannot be written."""
        return self.trouble is not None

    @property
    def trouble(self) -> str | None:
        """Why the file cannot be written, in a sentence."""
        return None if self._file is None else self._file.trouble

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, key: SessionKey) -> Session | None:
        """The session, where it exists and has not expired."""
        session = self._sessions.get(key) or self._take_late(key)
        if session is None or (not session.in_use and self._clock() - session.used_at > self.bounds.ttl_s):
            return None
        return session

    async def fetch(self, key: SessionKey) -> Session | None:
        """As `find`, for a store that is asked over the network when the session is not in memory. Awaited once in a
        turn, before its `ack`; what the turn decides of the session comes after it, in one step of the loop. Raises
        nothing today; a remote store that does not answer raises a `WireError`, which ends the turn."""
        return self.find(key)

    def open(self, key: SessionKey) -> Session:
        """The session, made where there is none. Counts as use; drops what is over the bounds."""
        session = self.find(key)
        if session is None:
            self._remove(key)  # one that has expired
            session = self._add(Session(key))
        session.used_at = self._clock()
        self._sessions.move_to_end(key)
        self.by_key[session.key_name].sessions.move_to_end(key)
        self._drop(session)
        return session

    def recent(self, within_s: float) -> list[Session]:
        """Those used within the last seconds, the latest first."""
        since = self._clock() - within_s
        return [session for session in reversed(self._sessions.values()) if session.used_at >= since]

    def keep(self, session: Session) -> None:
        """To be called when a session has changed. Drops what is over the bounds now."""
        if self._sessions.get(session.key) is session:
            self._weigh(session)
            self._drop(session)
        if self._file is not None and not session.forgotten:
            self._file.put(session.used_at, record_of(session))

    def forget(self, key: SessionKey) -> tuple[Session | None, Future[None] | None]:
        """Takes a session out, and has the file erase it, whether somebody waits for that or not. A turn that
        still runs in it is not kept. The future is done when nothing can be read in the file; None without a file."""
        if key not in self._sessions:
            self._take_late(key)
        session = self._remove(key)
        if session is not None:
            session.forgotten = True
        return session, None if self._file is None else self._file.forget(key)

    def start(self) -> None:
        """Begins to write the file, once the engines' processes run."""
        if self._file is not None:
            self._file.start()

    def close(self) -> None:
        """Writes what the file lacks. Blocks, for a few seconds at most."""
        if self._file is not None:
            self._file.close(_FLUSH_S)

    def _restore(self, used_at: float, kept: SessionRecord) -> Session:
        session = restored(kept)
        session.used_at = used_at
        return self._add(session)

    def _take_late(self, key: SessionKey) -> Session | None:
        """A session that the file could only be asked for after the start. It was used before all that are here."""
        late = self._file.take(key) if self._file is not None else None
        if late is None:
            return None
        session = self._restore(*late)
        for held in (self.held, self.by_key[session.key_name]):
            held.sessions.move_to_end(key, last=False)
        return session

    def _add(self, session: Session) -> Session:
        session.bytes = session.weigh()
        for held in (self.held, self.by_key.setdefault(session.key_name, Held())):
            held.sessions[session.key] = session
            held.bytes += session.bytes
        return session

    def _remove(self, key: SessionKey) -> Session | None:
        session = self._sessions.get(key)
        if session is None:
            return None
        own = self.by_key[session.key_name]
        for held in (self.held, own):
            del held.sessions[key]
            held.bytes -= session.bytes
        if not own.sessions:
            del self.by_key[session.key_name]
        return session

    def _weigh(self, session: Session) -> None:
        more = session.weigh() - session.bytes
        session.bytes += more
        for held in (self.held, self.by_key[session.key_name]):
            held.bytes += more

    def _drop(self, newest: Session) -> None:
        """Drops what has expired, and what is over the bounds."""
        since, bounds = self._clock() - self.bounds.ttl_s, self.bounds
        for session in list(itertools.takewhile(lambda session: session.used_at < since, self._sessions.values())):
            if not session.in_use and session is not newest:
                self._remove(session.key)
        while self.by_key[newest.key_name].is_over(bounds.key_sessions, bounds.key_bytes):
            if not self._drop_oldest(newest.key_name, newest):
                break
        while self.held.is_over(bounds.sessions, bounds.bytes):
            keys = len(self.by_key)
            own = self.by_key[newest.key_name]
            rich = own.is_over(bounds.sessions // keys, bounds.bytes // keys)
            name = newest.key_name if rich else max(self.by_key, key=self._share)
            if not self._drop_oldest(name, newest):
                break

    def _drop_oldest(self, key_name: str, newest: Session) -> bool:
        """Drops the oldest of a key that is not in use, if there is one."""
        for session in self.by_key[key_name].sessions.values():
            if not session.in_use and session is not newest:
                self._remove(session.key)
                return True
        return False

    def _share(self, key_name: str) -> float:
        own = self.by_key[key_name]
        return max(len(own.sessions) / self.bounds.sessions, own.bytes / self.bounds.bytes)
