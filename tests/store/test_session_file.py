"""store/sqlite.py: what a restart finds again, whatever happens to the process, the disk and the clock."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import fill
from privileged import tmpfs

from yaptext.dialogue.persona import Persona
from yaptext.dialogue.session import Session
from yaptext.dialogue.session_store import Bounds, SessionStore
from yaptext.dialogue.tools import ToolSet
from yaptext.errors import SettingsError, StartError
from yaptext.store import sqlite, sqlite_rows
from yaptext.store.sqlite import SessionFile
from yaptext.store.sqlite_rows import Rows

SECRET = "a long secret of the test"
WORDS = "the words nobody should find"


class Clocks:
    """The time that passes (`now`) and the time of day, which somebody may set."""

    def __init__(self) -> None:
        self.now, self.set_by = 1000.0, 1.7e9

    def clock(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.set_by


class Log(list[dict[str, Any]]):
    """Takes the place of the logger."""

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: self.append({"level": level, "event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self if line["event"] == event]


def log_of(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What the session file logs from now on."""
    log = Log()
    for module in (sqlite, sqlite_rows):
        monkeypatch.setattr(module, "log", log)
    return log


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return log_of(monkeypatch)


class Life:
    """One process's life with the file, whose thread is the test: nothing is written but by `write`."""

    def __init__(
        self, path: Path, clocks: Clocks, secret: str | None = None, most: int = 100, ttl_s: float = 60
    ) -> None:
        rows = Rows(path, secret, max_sessions=most, ttl_s=ttl_s, clock=clocks.clock, wall=clocks.wall)
        self.file = SessionFile(rows)
        self.store = SessionStore(Bounds(most, ttl_s), clock=clocks.clock, file=self.file)

    def say(self, session_id: str, text: str = WORDS) -> Session:
        session = self.store.open(("k", session_id))
        session.transcript.add_turn(text, "a reply")
        session.turns += 1
        self.store.keep(session)
        return session

    def write(self) -> None:
        self.file.write()

    def end(self) -> None:
        self.file.stopping.set()
        self.file.run()
        self.file.close(0)


def said(life: Life, session_id: str) -> list[str] | None:
    session = life.store.find(("k", session_id))
    return None if session is None else [message.text for message in session.transcript.messages]


def on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a folder" / "sessions.db"


# --- what is kept


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_session_is_what_it_was(path: Path, clocks: Clocks, secret: str | None) -> None:
    """Persona, transcript, seed, number of turns and tools; token ids and the running turn are of the process."""
    life = Life(path, clocks, secret)
    session = life.say("ünï")
    session.persona = Persona("savage", "woman", "non-binary", "You are Ada.")
    session.tools = ToolSet([{"name": "play", "examples": [{"message": "play jazz", "arguments": {}}]}])
    life.store.keep(session)
    life.end()
    again = Life(path, clocks, secret).store.find(("k", "ünï"))
    assert again is not None and again is not session
    assert (again.persona, again.seed, again.turns) == (session.persona, session.seed, 1)
    assert [(m.speaker, m.text) for m in again.transcript.messages] == [("user", WORDS), ("assistant", "a reply")]
    assert again.tools is not None and again.tools.key == session.tools.key
    assert again.current is None


def test_a_style_that_is_gone_is_the_default_again(path: Path, clocks: Clocks) -> None:
    """A style file was deleted in between: the rest of the persona stays."""
    life = Life(path, clocks)
    session = life.say("a")
    session.persona = Persona("no such style", "man")
    life.store.keep(session)
    life.end()
    again = Life(path, clocks).store.find(("k", "a"))
    assert again is not None and again.persona == Persona(None, "man")


def test_many_changes_of_a_session_are_one_row(path: Path, clocks: Clocks) -> None:
    """The last one counts, within a write and over several."""
    life = Life(path, clocks)
    for _ in range(3):
        life.say("a")
        life.say("a")
        life.write()
    life.end()
    again = Life(path, clocks)
    assert len(said(again, "a") or ()) == 12
    assert len(again.store) == 1


def test_the_file_is_for_its_user_alone(path: Path, clocks: Clocks) -> None:
    """Also what SQLite and the lock put beside it, and one that was readable before."""
    path.parent.mkdir()
    path.touch(0o644)
    life = Life(path, clocks)
    life.say("a")
    life.write()
    files = list(path.parent.iterdir())
    assert len(files) == 4 and {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_with_a_key_nothing_can_be_read(path: Path, clocks: Clocks) -> None:
    """Neither texts nor session ids; without one the texts are plain."""
    for name, secret in (("sealed.db", SECRET), ("plain.db", None)):
        life = Life(path.with_name(name), clocks, secret)
        life.say("user-4711")
        life.end()
    assert WORDS.encode() in on_disk(path.with_name("plain.db"))
    assert WORDS.encode() not in on_disk(path.with_name("sealed.db"))
    assert b"4711" not in on_disk(path.with_name("sealed.db"))


@pytest.mark.parametrize("other", ["another secret of the test", None])
def test_under_another_key_they_are_not_lost(path: Path, clocks: Clocks, log: Log, other: str | None) -> None:
    """It is told how many cannot be read; with the right key they are back."""
    life = Life(path, clocks, SECRET)
    life.say("a")
    life.end()
    wrong = Life(path, clocks, other)
    assert said(wrong, "a") is None
    assert [line["sessions"] for line in log.of("sessions.unreadable")] == [1]
    wrong.say("b")
    wrong.end()
    assert said(Life(path, clocks, SECRET), "a") == [WORDS, "a reply"]


# --- what is not kept


def test_what_expired_is_deleted(path: Path, clocks: Clocks) -> None:
    """SESSION_TTL_S holds for the file: while it runs and over a restart, and no byte of the text is left."""
    life = Life(path, clocks)
    life.say("a")
    life.write()
    clocks.now += 61
    life.say("b", "other words")
    life.write()
    assert WORDS.encode() not in on_disk(path) and b"other words" in on_disk(path)
    life.end()
    clocks.now += 61
    assert len(Life(path, clocks).store) == 0
    assert b"other words" not in on_disk(path)


def test_an_idle_process_deletes_too(path: Path, clocks: Clocks) -> None:
    """Nobody needs to say anything for it."""
    life = Life(path, clocks)
    life.say("a")
    life.write()
    clocks.now += 61
    life.write()
    assert WORDS.encode() not in on_disk(path)


def test_the_least_recently_used_is_deleted_first(path: Path, clocks: Clocks) -> None:
    """MAX_SESSIONS holds for the file, and for what waits to be written."""
    life = Life(path, clocks, most=3)
    for name in "abcdaef":
        clocks.now += 1
        life.say(name)
        life.write()
    for name in "gh":
        clocks.now += 1
        life.say(name)
    life.end()
    again = Life(path, clocks, most=3)
    assert [name for name in "abcdefgh" if said(again, name)] == ["f", "g", "h"]


# --- the clock


@pytest.mark.parametrize("step", [-3e7, -100, -0.5, 0.5, 100, 3e7])
def test_a_clock_that_is_set_while_it_runs_ages_nobody(path: Path, clocks: Clocks, step: float) -> None:
    """Neither then nor at the restart: by as much as it was set, the times in the file are set."""
    life = Life(path, clocks)
    life.say("a")
    life.write()
    clocks.set_by += step
    clocks.now += 30
    life.say("b")
    life.write()
    life.end()
    clocks.now += 20
    again = Life(path, clocks)
    assert said(again, "a") and said(again, "b")
    clocks.now += 15
    assert not said(again, "a") and said(again, "b")
    clocks.now += 30
    assert not said(again, "b")


def test_a_clock_that_is_set_back_between_two_lives_keeps_nobody_for_ever(path: Path, clocks: Clocks) -> None:
    """A use in the future counts as one of now."""
    life = Life(path, clocks)
    life.say("a")
    life.end()
    clocks.set_by -= 3e7
    again = Life(path, clocks)
    assert said(again, "a")
    clocks.now += 61
    again.write()
    assert not said(again, "a")
    assert WORDS.encode() not in on_disk(path)


# --- the disk


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Somebody else has the file for writing."""
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def test_a_busy_file_delays_no_turn_and_loses_nothing(path: Path, clocks: Clocks, log: Log) -> None:
    """One line when it begins, one when it is over; what changed meanwhile is written then."""
    life = Life(path, clocks)
    life.say("a")
    life.write()
    with held(path):
        for name in "bc":
            life.say(name)
            life.write()
    assert [line["sessions"] for line in log.of("sessions.unsaved")] == [1]
    life.write()
    assert [line["sessions"] for line in log.of("sessions.saved")] == [2]
    life.end()
    assert all(said(Life(path, clocks), name) for name in "abc")


def test_what_could_not_be_written_is_told_at_the_end(path: Path, clocks: Clocks, log: Log) -> None:
    """With how many sessions a restart will not know."""
    life = Life(path, clocks)
    life.say("a")
    life.write()
    with held(path):
        for name in "abb":
            life.say(name)
        life.end()
    assert [line["sessions"] for line in log.of("sessions.lost")] == [2]


def test_a_file_that_was_removed_is_made_again(path: Path, clocks: Clocks, log: Log) -> None:
    """SQLite would go on writing into nothing."""
    life = Life(path, clocks)
    life.say("a")
    life.write()
    for file in path.parent.glob("sessions.db*"):
        if file.suffix != ".lock":
            file.unlink()
    life.say("b")
    life.write()
    assert "removed" in log.of("sessions.unsaved")[0]["error"]
    life.write()
    life.end()
    assert said(Life(path, clocks), "b")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    with tmpfs(tmp_path / "disk", "size=512k") as folder:
        yield folder


def test_a_full_disk_is_told_once_and_lived_through(small_disk: Path, clocks: Clocks, log: Log) -> None:
    """Conversations go on in memory; when there is room again all of them are written."""
    life = Life(small_disk / "sessions.db", clocks)
    life.say("a")
    life.write()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * 2**20)
    for name in "bcd":
        life.say(name, "many words " * 5000)
        life.write()
    assert [line["level"] for line in log.of("sessions.unsaved")] == ["warning"]
    assert "full" in log.of("sessions.unsaved")[0]["error"]
    filler.unlink()
    life.write()
    life.end()
    assert all(said(Life(small_disk / "sessions.db", clocks), name) for name in "abcd")


def test_a_read_only_disk_does_not_keep_the_service_from_starting(small_disk: Path, clocks: Clocks, log: Log) -> None:
    """It is told; what is said is written as soon as it can be."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    life = Life(small_disk / "sessions.db", clocks)
    life.say("a")
    life.write()
    assert len(log.of("sessions.unsaved")) == 1
    assert "Read-only" in log.of("sessions.unsaved")[0]["error"]
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    life.write()
    life.end()
    assert said(Life(small_disk / "sessions.db", clocks), "a")


# --- a start that finds a file which it cannot write, or not even read


def kill_a_writer(path: Path) -> None:
    """Leaves session `a` as a killed process does: with a log of writes, and shared memory beside it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = CHILD.replace("while True:", "for _ in range(3):") + "sys.stdin.read()\n"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        assert child.stderr is not None
        for _ in range(3):
            assert int(child.stderr.readline())
        child.kill()
    assert path.with_name(f"{path.name}-wal").stat().st_size


def left_behind(folder: Path, killed: bool) -> tuple[Path, Clocks]:
    """A file with one session, of a process that was killed or closed it."""
    path, clocks = folder / "sessions.db", Clocks()
    clocks.set_by = time.time() - clocks.now
    if killed:
        kill_a_writer(path)
    else:
        life = Life(path, clocks)
        life.say("a")
        life.end()
    return path, clocks


@pytest.mark.parametrize("gone", ["", "-shm", ".lock"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_start_on_a_full_disk_finds_the_sessions(small_disk: Path, log: Log, killed: bool, gone: str) -> None:
    """Of a process that was closed or killed, whatever is missing beside the file. What is said meanwhile is written
    when there is room again."""
    path, clocks = left_behind(small_disk, killed)
    if gone:
        path.with_name(f"{path.name}{gone}").unlink(missing_ok=True)
    filler = fill(small_disk)
    again = Life(path, clocks)
    before = said(again, "a")
    assert before and not log.of("sessions.not_read")
    assert again.file.rows.lock is not None, "no second process takes it"
    assert [line["sessions"] for line in log.of("sessions.restored")][-1:] == [1]
    if not killed:  # what a killed process left beside the file may make room
        assert again.file.trouble and len(log.of("sessions.unsaved")) == 1
    again.say("a", "more")
    again.write()
    filler.unlink()
    again.write()
    assert not again.file.trouble
    again.end()
    assert said(Life(path, clocks), "a") == [*before, "more", "a reply"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_start_on_a_read_only_disk_finds_the_sessions(small_disk: Path, log: Log, killed: bool) -> None:
    """With the log of writes that a killed process left, and without one."""
    path, clocks = left_behind(small_disk, killed)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert said(Life(path, clocks), "a")
    assert len(log.of("sessions.unsaved")) == 1 and not log.of("sessions.not_read")


def test_a_log_that_cannot_be_read_is_read_later(small_disk: Path, log: Log) -> None:
    """On a disk for reading alone SQLite needs the shared memory that belongs to it. Reading the file without its log
    would find an older state."""
    path, clocks = small_disk / "sessions.db", Clocks()
    clocks.set_by = time.time() - clocks.now
    kill_a_writer(path)
    path.with_name(f"{path.name}-shm").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    again = Life(path, clocks)
    assert said(again, "a") is None and len(log.of("sessions.not_read")) == 1
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    again.write()
    assert said(again, "a")


def test_a_file_that_is_busy_at_the_start_is_read(path: Path, clocks: Clocks, log: Log) -> None:
    """Who writes keeps nobody from reading."""
    life = Life(path, clocks)
    life.say("a")
    life.end()
    with held(path):
        again = Life(path, clocks)
    assert said(again, "a") and len(log.of("sessions.unsaved")) == 1
    again.end()
    assert said(Life(path, clocks), "a")


def test_a_file_that_cannot_be_written_is_read_within_its_bounds(path: Path, clocks: Clocks) -> None:
    """What has expired, and what is over MAX_SESSIONS, could not be deleted."""
    life = Life(path, clocks)
    for name in "abcd":
        life.say(name)
        clocks.now += 20
    life.end()
    with held(path):
        again = Life(path, clocks, most=2, ttl_s=70)
    assert [name for name in "abcd" if said(again, name)] == ["c", "d"]
    assert len(again.store) == 2


@contextmanager
def shut(path: Path) -> Iterator[None]:
    """Somebody else has the file, also for reading."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.executescript("PRAGMA locking_mode=EXCLUSIVE; UPDATE session SET used_at = used_at;")
        yield


def test_what_was_not_read_is_never_replaced(path: Path, clocks: Clocks, log: Log) -> None:
    """An error says so once. When the file can be read, a session that did not begin again comes back to its client; of
    one that did, memory has the new one, and the file has both."""
    life = Life(path, clocks)
    for name in "ab":
        session = life.say(name, f"before {name}")
        session.persona = Persona("savage")
        life.store.keep(session)
    life.end()
    with shut(path):
        again = Life(path, clocks)
        assert said(again, "b") is None
        again.say("a", "since")
        again.write()
        assert again.file.trouble
    (line,) = log.of("sessions.not_read")
    assert line["level"] == "error" and line["error"] == "database is locked" and line["file"] == str(path)
    assert not log.of("sessions.unsaved")
    with held(path):
        again.write()
    assert again.file.trouble and again.file.take(("k", "a")) is None, "read, and not written"
    again.write()
    assert not again.file.trouble and again.file.take(("k", "a")) is None
    again.say("a", "and more")
    assert said(again, "a") == ["since", "a reply", "and more", "a reply"]
    assert said(again, "b") == ["before b", "a reply"]
    again.say("b", "back")
    again.end()
    third = Life(path, clocks)
    assert said(third, "a") == ["before a", "a reply", "since", "a reply", "and more", "a reply"]
    assert said(third, "b") == ["before b", "a reply", "back", "a reply"]
    session = third.store.find(("k", "a"))
    assert session is not None and (session.turns, session.persona) == (3, Persona("savage"))


def test_what_is_forgotten_unread_stays_forgotten(path: Path, clocks: Clocks) -> None:
    """Before the file was read, and after: no client finds it, no byte of it is left, and no later row begins with
    it."""
    life = Life(path, clocks)
    for name in "abc":
        life.say(name)
    life.end()
    with shut(path):
        again = Life(path, clocks)
        erased = again.store.forget(("k", "a"))[1]
        again.say("c", "since")
        again.write()
        assert erased is not None and not erased.done()
    again.write()
    assert erased.done() and said(again, "a") is None
    session, erased = again.store.forget(("k", "b"))
    assert session is not None and erased is not None
    again.store.forget(("k", "c"))
    again.write()
    assert erased.done() and said(again, "b") is None
    assert WORDS.encode() not in on_disk(path)
    again.say("c", "another")
    again.end()
    assert said(Life(path, clocks), "c") == ["another", "a reply"]


def test_what_is_read_late_expires(path: Path, clocks: Clocks) -> None:
    """In memory, too, whose client never returned."""
    life = Life(path, clocks)
    life.say("a")
    life.end()
    with shut(path):
        again = Life(path, clocks)
    again.write()
    assert len(again.file.late) == 1
    clocks.now += 61
    again.write()
    assert not again.file.late and said(again, "a") is None


@pytest.mark.parametrize(("first", "last"), [(0, 100), (100, 4096), (4096, 8192), (5000, 20_000)])
def test_a_damaged_file_is_moved_aside(path: Path, clocks: Clocks, log: Log, first: int, last: int) -> None:
    """Whatever part of it was overwritten; it is told where it went, and a new one serves."""
    life = Life(path, clocks)
    for number in range(30):
        life.say(f"session {number}", "many words " * 100)
    life.end()
    whole = path.read_bytes()
    assert len(whole) > last
    path.write_bytes(whole[:first] + bytes(last - first) + whole[last:])
    again = Life(path, clocks)
    (line,) = log.of("sessions.damaged")
    assert Path(line["moved_to"]).read_bytes()[last:] == whole[last:]
    again.say("a")
    again.end()
    assert said(Life(path, clocks), "a")


def test_a_file_that_is_something_else_is_left_alone(path: Path, clocks: Clocks) -> None:
    """A wrong path must not cost anybody a file, nor its readers."""
    path.parent.mkdir()
    notes, other = path.with_name("notes.txt"), path.with_name("other.db")
    notes.write_text("my notes, which are longer than a header\n" * 9)
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    for file in (notes, other):
        file.chmod(0o644)
        before = file.read_bytes()
        with pytest.raises(SettingsError, match=f"SESSION_STORE='{file}' is not allowed"):
            Life(file, clocks)
        assert file.read_bytes() == before and file.stat().st_mode & 0o777 == 0o644
    assert not list(path.parent.glob("notes.txt?*"))


def test_a_fifo_is_no_session_file(path: Path, clocks: Clocks) -> None:
    """To open one for reading blocks until somebody opens it for writing."""
    path.parent.mkdir()
    os.mkfifo(path)
    blocked = threading.Thread(target=lambda: path.open("wb").close(), daemon=True)
    blocked.start()  # so that a start that opens it goes on, and fails the test
    with pytest.raises(SettingsError, match=f"SESSION_STORE='{path}' is not allowed: it is no regular file"):
        Life(path, clocks)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    blocked.join(60)
    os.close(reader)


# --- one row, and the others


def test_a_session_that_is_too_large_holds_up_nobody_else(path: Path, clocks: Clocks, log: Log) -> None:
    """It is left out alone and named once by key and hash; the file finds it as it was last written, and takes it again
    as soon as it fits."""
    life = Life(path, clocks)
    life.say("big", "small yet")
    life.write()
    assert life.file.rows.database is not None
    life.file.rows.database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 5000)
    for name in ("before", "big", "after", "big"):
        life.say(name, WORDS * 1000 if name == "big" else WORDS)
        life.write()
    (line,) = log.of("session.left_out")
    assert (line["level"], line["key"]) == ("warning", "k")
    assert WORDS not in str(line) and "big" not in str(line)
    assert not life.file.trouble and not log.of("sessions.unsaved")
    life.file.close(0)
    assert log.of("sessions.lost")[0]["sessions"] == 1
    again = Life(path, clocks)
    assert said(again, "before") and said(again, "after") and said(again, "big") == ["small yet", "a reply"]
    session = again.store.find(("k", "big"))
    assert session is not None
    session.transcript.messages.clear()
    again.say("big", "small again")
    again.end()
    assert said(Life(path, clocks), "big") == ["small again", "a reply"]


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_session_that_is_no_text_holds_up_nobody_else(
    path: Path, clocks: Clocks, log: Log, secret: str | None
) -> None:
    """Half a surrogate pair has no bytes: in what was said, and in an id."""
    life = Life(path, clocks, secret)
    life.say("a", "\ud800")
    life.say("\ud800")
    life.say("b")
    life.write()
    assert [line["error"] for line in log.of("session.left_out")] == ["UnicodeEncodeError"] * 2
    life.file.forget(("k", "\ud800"))
    life.end()
    assert said(Life(path, clocks, secret), "b")


def bodies(path: Path) -> list[bytes]:
    with closing(sqlite3.connect(path)) as database:
        return [body for (body,) in database.execute("SELECT body FROM session ORDER BY used_at")]


def rewrite(life: Life, session_id: str, **fields: Any) -> None:
    """As another version would have it; a field of None is left out."""
    seal, id = life.file.rows.seal, life.file.rows.seal.id(("k", session_id))
    with closing(sqlite3.connect(life.file.rows.path, isolation_level=None)) as database:
        ((body,),) = database.execute("SELECT body FROM session WHERE id = ?", (id,))
        if seal.cipher is not None:
            body = seal.cipher.decrypt(body[:12], body[12:], id)
        form = json.loads(body) | fields
        body = json.dumps({name: form[name] for name in form if fields.get(name, "") is not None}).encode()
        if seal.cipher is not None:
            body = bytes(12) + seal.cipher.encrypt(bytes(12), body, id)
        database.execute("UPDATE session SET body = ? WHERE id = ?", (body, id))


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("fields", [{"version": 2, "mood": "glad"}, {"turns": "two"}, {"messages": {"user": "hi"}}])
def test_what_another_version_wrote_is_never_replaced(
    path: Path, clocks: Clocks, log: Log, secret: str | None, fields: dict[str, Any]
) -> None:
    """A session of the same id goes on in memory, which is told once; the others are kept, and a client that has its
    session forgotten has the row erased."""
    life = Life(path, clocks, secret)
    life.say("a")
    clocks.now += 1
    life.say("b")
    life.end()
    rewrite(life, "a", **fields)
    theirs = bodies(path)[0]
    again = Life(path, clocks, secret)
    assert said(again, "a") is None and said(again, "b")
    (line,) = log.of("sessions.unreadable")
    assert (line["sessions"], line["of_other_versions"]) == (1, 1)
    for _ in range(2):
        again.say("a", "to the version before")
        again.say("c")
        again.write()
    assert bodies(path)[0] == theirs
    assert [line["error"] for line in log.of("session.left_out")] == ["the row is of another version"]
    assert not again.file.trouble
    again.file.forget(("k", "a"))
    again.end()
    assert theirs not in bodies(path)
    third = Life(path, clocks, secret)
    assert said(third, "b") and said(third, "c") and not said(third, "a")


def test_a_body_tells_its_version_and_one_that_tells_none_is_read(path: Path, clocks: Clocks) -> None:
    """As they were written before bodies had one; such a row may be replaced."""
    life = Life(path, clocks)
    life.say("a")
    life.end()
    assert json.loads(bodies(path)[0])["version"] == 1
    rewrite(life, "a", version=None)
    assert "version" not in json.loads(bodies(path)[0])
    again = Life(path, clocks)
    assert said(again, "a") == [WORDS, "a reply"]
    again.say("a")
    again.end()
    assert json.loads(bodies(path)[0])["version"] == 1


def test_a_row_that_nobody_can_read_is_replaced(path: Path, clocks: Clocks, log: Log) -> None:
    """A damaged body keeps no session from being kept again."""
    life = Life(path, clocks)
    life.say("a")
    life.end()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE session SET body = x'7b00'")
    again = Life(path, clocks)
    assert log.of("sessions.unreadable")[0]["of_other_versions"] == 0
    again.say("a")
    again.end()
    assert said(Life(path, clocks), "a")


# --- the thread


def test_an_error_that_nobody_thought_of_is_lived_through(path: Path, clocks: Clocks, log: Log) -> None:
    """It is told without its words, which may quote what was said, and the write is tried again."""
    life = Life(path, clocks)
    purge = life.file.rows.purge

    def surprise(_: sqlite3.Connection) -> None:
        raise KeyError(WORDS)

    life.file.rows.purge = surprise  # type: ignore[method-assign]
    life.say("a")
    life.write()
    assert life.file.trouble
    assert log.of("sessions.unsaved")[0]["error"] == "KeyError"
    life.file.rows.purge = purge  # type: ignore[method-assign]
    life.write()
    assert not life.file.trouble and len(log.of("sessions.saved")) == 1
    life.end()
    assert said(Life(path, clocks), "a")


def test_a_thread_that_has_died_is_told(path: Path, clocks: Clocks, log: Log) -> None:
    """One error line, and the file counts as failing from then on; the end tells what was lost."""
    life = Life(path, clocks)
    assert not life.file.trouble

    def die() -> None:
        raise SystemExit

    life.file.write = die  # type: ignore[method-assign]
    life.say("a")
    life.file.start()
    life.file.thread.join(60)
    assert life.file.trouble
    (line,) = log.of("sessions.writer_died")
    assert (line["level"], line["error"]) == ("error", "SystemExit")
    life.file.close(0)
    assert log.of("sessions.lost")[0]["sessions"] == 1


# --- processes

CHILD = """
import sys
from pathlib import Path
from yaptext.dialogue.session_store import Bounds, SessionStore
from yaptext.store.sqlite import SessionFile
from yaptext.store.sqlite_rows import Rows
file = SessionFile(Rows(Path(sys.argv[1]), None, max_sessions=100, ttl_s=60))
store = SessionStore(Bounds(100, 60), file=file)
session = store.open(("k", "a"))
while True:
    session.turns += 1
    session.transcript.messages.clear()
    session.transcript.add_turn("words " * 3000, str(session.turns))
    store.keep(session)
    file.write()
    print(session.turns, file=sys.stderr, flush=True)
"""


def test_a_killed_process_loses_nothing_that_was_written(path: Path) -> None:
    """At whatever moment of a write: the file is whole and holds at least the last one that ended. While it lives, a
    second start is told who has the file."""
    command = [sys.executable, "-c", CHILD, str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stderr is not None
            for _ in range(30):
                written = int(child.stderr.readline())
            with pytest.raises(StartError, match=f"in use by process {child.pid}$"):
                SessionFile(Rows(path, None, max_sessions=9, ttl_s=60)).load()
            child.send_signal(signal.SIGKILL)
            written = max([written, *(int(line) for line in child.stderr if line.endswith("\n"))])
        file = SessionFile(Rows(path, None, max_sessions=100, ttl_s=60))
        ((_, kept),) = file.load()
        file.close(0)
        assert kept.turns >= written and kept.messages[1] == ("assistant", str(kept.turns))
