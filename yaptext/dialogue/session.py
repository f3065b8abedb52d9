"""Sessions: what is remembered of one user between turns, and which turn is running."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yaptext.dialogue.history import Transcript
from yaptext.dialogue.layout import Rounds
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.sessionfile import SessionFile
from yaptext.settings import Settings
from yaptext.wire.messages import IdentifiedCall

if TYPE_CHECKING:
    from yaptext.dialogue.toolset import ToolSet
    from yaptext.dialogue.turn import Turn

SessionKey = tuple[str, str]
"""(name of the API key, session_id): nobody reaches another key's sessions."""
_FLUSH_S = 5.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Calls that a client was asked to make in turn `turn`, and what came of those before for the same utterance."""

    turn: int
    utterance: str | None
    calls: Sequence[IdentifiedCall]
    made: Sequence[IdentifiedCall] = ()
    results: Sequence[str] = ()
    done: Rounds = ()
    """The rounds of calls before this one."""
    note: str = ""
    speakable: bool = False
    """Of the turn that asked first."""
    rounds: int = 1

    @property
    def all_calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Every call for this utterance, without its id."""
        return [(call.name, call.arguments) for call in (*self.made, *self.calls)]


class Session:
    """One user of one key. It outlives its sockets; two sockets may share it."""

    __slots__ = (
        "asked", "current", "forgotten", "key", "persona", "seed", "tools", "transcript", "turns", "used_at", "warming",
    )  # fmt: skip

    def __init__(self, key: SessionKey) -> None:
        self.key = key
        self.persona = Persona()
        self.seed = secrets.randbits(31)
        self.tools: ToolSet | None = None
        self.transcript = Transcript()
        self.turns = 0
        self.current: Turn | None = None
        self.asked: Asked | None = None
        """Calls whose results the last turn waits for."""
        self.warming: asyncio.Task[None] | None = None
        self.forgotten = False
        self.used_at = 0.0

    @property
    def key_name(self) -> str:
        return self.key[0]

    @property
    def session_id(self) -> str:
        return self.key[1]


class SessionStore:
    """Sessions by key, least recently used first. Bounded in number and in idle time; a session whose turn
    runs is never dropped. With a `file` a restart finds them again."""

    def __init__(
        self,
        *,
        max_sessions: int,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        file: SessionFile | None = None,
    ) -> None:
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self._max, self._ttl_s, self._clock, self._file = max_sessions, ttl_s, clock, file
        for age_s, kept in file.load() if file is not None else ():
            session = self._sessions[kept.key] = Session(kept.key)
            session.used_at = clock() - age_s
            kept.fill(session)

    @classmethod
    def of(cls, settings: Settings) -> SessionStore:
        """The store of `SESSION_STORE`, with what its file holds. Blocks. Raises as `SessionFile.load` does."""
        path, secret = settings.session_file, settings.session_store_key
        bounds: dict[str, Any] = {"max_sessions": settings.max_sessions, "ttl_s": settings.session_ttl_s}
        if path is None:
            return cls(**bounds)
        return cls(**bounds, file=SessionFile(path, secret.get_secret_value() if secret else None, **bounds))

    @property
    def file_failing(self) -> bool:
        """True while the file, where there is one, cannot be written."""
        return self._file is not None and self._file.failing

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, key: SessionKey) -> Session | None:
        """The session, where it exists and has not expired."""
        session = self._sessions.get(key)
        if session is None or (session.current is None and self._clock() - session.used_at > self._ttl_s):
            return None
        return session

    def open(self, key: SessionKey) -> Session:
        """The session, made where there is none. Counts as use; drops what is over the bounds."""
        session = self.find(key)
        if session is None:
            session = self._sessions[key] = Session(key)
        session.used_at = self._clock()
        self._sessions.move_to_end(key)
        self._drop(session)
        return session

    def recent(self, within_s: float) -> list[Session]:
        """Those used within the last seconds, the latest first."""
        since = self._clock() - within_s
        return [session for session in reversed(self._sessions.values()) if session.used_at >= since]

    def keep(self, session: Session) -> None:
        """To be called when a session has changed."""
        if self._file is not None and not session.forgotten:
            self._file.put(session)

    def forget(self, key: SessionKey) -> tuple[Session | None, Future[None] | None]:
        """Takes a session out, and has the file erase it, whether somebody waits for that or not. A turn that
        still runs in it is not kept. The future is done when nothing can be read in the file; None without a file."""
        session = self._sessions.pop(key, None)
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

    def _drop(self, newest: Session) -> None:
        now = self._clock()
        dropped: list[SessionKey] = []
        for key, session in self._sessions.items():
            expired = now - session.used_at > self._ttl_s
            if session is newest or (not expired and len(self._sessions) - len(dropped) <= self._max):
                break  # the rest was used later still
            if session.current is None:
                dropped.append(key)
        for key in dropped:
            del self._sessions[key]
