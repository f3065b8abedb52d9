"""dialogue/sessionfile.py: what a restart finds again, whatever happens to the process, the disk and the clock."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from privileged import tmpfs

from yaptext.dialogue import sessionfile
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.session import Session, SessionStore
from yaptext.dialogue.sessionfile import SessionFile
from yaptext.dialogue.toolset import ToolSet
from yaptext.errors import SettingsError, StartError

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


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(sessionfile, "_log", log)
    return log


class Life:
    """One process's life with the file, whose thread is the test: nothing is written but by `write`."""

    def __init__(
        self, path: Path, clocks: Clocks, secret: str | None = None, most: int = 100, ttl_s: float = 60
    ) -> None:
        self.file = SessionFile(path, secret, max_sessions=most, ttl_s=ttl_s, clock=clocks.clock, wall=clocks.wall)
        self.store = SessionStore(max_sessions=most, ttl_s=ttl_s, clock=clocks.clock, file=self.file)

    def say(self, session_id: str, text: str = WORDS) -> Session:
        session = self.store.open(("k", session_id))
        session.transcript.add_turn(text, "a reply")
        session.turns += 1
        self.store.keep(session)
        return session

    def write(self) -> None:
        self.file._write()

    def end(self) -> None:
        self.file._stop.set()
        self.file._run()
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


# --- processes

CHILD = """
import sys
from pathlib import Path
from yaptext.dialogue.session import SessionStore
from yaptext.dialogue.sessionfile import SessionFile
file = SessionFile(Path(sys.argv[1]), None, max_sessions=100, ttl_s=60)
store = SessionStore(max_sessions=100, ttl_s=60, file=file)
session = store.open(("k", "a"))
while True:
    session.turns += 1
    session.transcript.messages.clear()
    session.transcript.add_turn("words " * 3000, str(session.turns))
    store.keep(session)
    file._write()
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
                SessionFile(path, None, max_sessions=9, ttl_s=60).load()
            child.send_signal(signal.SIGKILL)
            written = max([written, *(int(line) for line in child.stderr if line.endswith("\n"))])
        file = SessionFile(path, None, max_sessions=100, ttl_s=60)
        ((_, kept),) = file.load()
        file.close(0)
        assert kept.turns >= written and kept.messages[1] == ("assistant", str(kept.turns))
