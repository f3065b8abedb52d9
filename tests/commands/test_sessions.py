"""commands/sessions.py: the session file shown, backed up and restored, while a service has it and while none does."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from privileged import require
from store.test_session_file import CHILD, SECRET, WORDS, Clocks, Life, bodies, log_of, on_disk, rewrite, said

from yaptext.commands import main

CHOWN = 0
"""Of capabilities(7)."""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of SESSION_STORE."""
    log_of(monkeypatch)
    path = tmp_path / "state" / "sessions.db"
    monkeypatch.setenv("SESSION_STORE", f"sqlite:{path}")
    monkeypatch.delenv("SESSION_STORE_KEY", raising=False)
    return path


@pytest.fixture
def clocks() -> Clocks:
    clocks = Clocks()
    clocks.set_by = time.time() - clocks.now
    return clocks


def kept(path: Path, clocks: Clocks, *names: str, secret: str | None = None) -> Life:
    """A life that goes on, with sessions that are written."""
    life = Life(path, clocks, secret, ttl_s=3600)
    for name in names:
        life.say(name)
    life.write()
    return life


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that ends with an error."""
    assert main.run(["sessions", *map(str, arguments)]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    return line


@contextmanager
def running(path: Path) -> Iterator[int]:
    """Another process that has the file and writes it; its id."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        for _ in range(3):
            assert int(child.stderr.readline())
        try:
            yield child.pid
        finally:
            child.kill()


def test_the_file_is_shown(path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str]) -> None:
    """With what is only in the log of writes, and without a word of it."""
    life = kept(path, clocks, "a", "b")
    assert main.run(["sessions"]) == 0
    shown = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert (shown["file"], shown["sessions"]) == (str(path), "2")
    assert int(shown["bytes"]) == path.stat().st_size + path.with_name("sessions.db-wal").stat().st_size
    assert shown["oldest use"].startswith("20") and shown["oldest use"].endswith("+00:00")
    assert shown["latest use"] >= shown["oldest use"]
    life.end()


def test_a_running_service_is_shown_and_backed_up(
    path: Path, tmp_path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on writing; the copy is whole."""
    with running(path):
        assert main.run(["sessions"]) == 0
        assert "sessions: 1\n" in capsys.readouterr().out
        for number in range(3):
            assert main.run(["sessions", "backup", str(tmp_path / f"copy{number}")]) == 0
    for number in range(3):
        assert said(Life(tmp_path / f"copy{number}", clocks, ttl_s=3600), "a")


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_backup_is_what_a_restore_puts_back(
    path: Path, tmp_path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str], secret: str | None
) -> None:
    """Sealed rows stay sealed, and the commands need no key. The file before stays beside the new one."""
    copy = tmp_path / "copy"
    life = kept(path, clocks, "a", "b", secret=secret)
    assert main.run(["sessions", "backup", str(copy)]) == 0
    assert capsys.readouterr().out == f"copied 2 sessions into {copy}\n"
    assert (WORDS.encode() in on_disk(copy)) == (secret is None)
    assert list(tmp_path.glob("copy?*")) == [], "one file"
    life.store.forget(("k", "a"))
    life.say("c")
    life.end()
    for times in (1, 2):
        assert main.run(["sessions", "restore", str(copy)]) == 0
        line = capsys.readouterr().out
        assert (
            line.startswith(f"restored 2 sessions into {path}; the previous file is {path}.replaced-")
            and line[-1] == "\n"
        )
        aside = [file for file in path.parent.iterdir() if ".replaced-" in file.name]
        assert line.split()[-1] in map(str, aside) and len(aside) == times
    again = Life(path, clocks, secret, ttl_s=3600)
    assert said(again, "a") == [WORDS, "a reply"] and said(again, "b") and said(again, "c") is None
    again.end()
    (first, *_) = sorted(aside, key=lambda file: (len(file.name), file.name))
    before = Life(first, clocks, secret, ttl_s=3600)
    assert said(before, "c") and said(before, "a") is None


def test_a_restore_where_no_file_is(
    path: Path, tmp_path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a new machine; the folder is made. A log of writes alone is moved away: it belongs to another file."""
    copy, other = tmp_path / "copy", tmp_path / "other.db"
    kept(other, clocks, "a").end()
    other.rename(copy)
    assert main.run(["sessions", "restore", str(copy)]) == 0
    assert capsys.readouterr().out == f"restored 1 session into {path}; there was no previous file\n"
    assert said(Life(path, clocks, ttl_s=3600), "a")
    with running(other):
        pass
    path.unlink()
    other.with_name("other.db-wal").rename(path.with_name("sessions.db-wal"))
    assert main.run(["sessions", "restore", str(copy)]) == 0
    assert said(Life(path, clocks, ttl_s=3600), "a") == [WORDS, "a reply"]


def test_backup_and_restored_file_are_for_their_user_alone(path: Path, tmp_path: Path, clocks: Clocks) -> None:
    """Whatever the umask is: files 0600, a folder that is made 0700."""
    copy = tmp_path / "copy"
    kept(path, clocks, "a").end()
    old = os.umask(0)
    try:
        assert main.run(["sessions", "backup", str(copy)]) == 0
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()
        for _ in range(2):
            assert main.run(["sessions", "restore", str(copy)]) == 0
    finally:
        os.umask(old)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (copy, *path.parent.iterdir())} == {0o600}


def test_what_root_restores_belongs_to_the_service(path: Path, tmp_path: Path, clocks: Clocks) -> None:
    """As the file before does, or the folder: the service is another user."""
    require(CHOWN)
    copy = tmp_path / "copy"
    kept(path, clocks, "a").end()
    assert main.run(["sessions", "backup", str(copy)]) == 0
    for file in path.parent.iterdir():
        file.unlink()
    os.chown(path.parent, 4711, 4712)
    for _ in range(2):
        assert main.run(["sessions", "restore", str(copy)]) == 0
    assert {(file.stat().st_uid, file.stat().st_gid) for file in path.parent.iterdir()} == {(4711, 4712)}


def test_rows_of_another_version_are_copied_as_they_are(path: Path, tmp_path: Path, clocks: Clocks) -> None:
    """Nobody reads them on the way."""
    copy, life = tmp_path / "copy", kept(path, clocks, "a", secret=SECRET)
    rewrite(life, "a", version=2, mood="glad")
    theirs = bodies(path)
    assert main.run(["sessions", "backup", str(copy)]) == 0
    life.end()
    assert main.run(["sessions", "restore", str(copy)]) == 0
    assert bodies(copy) == bodies(path) == theirs


def test_a_restore_says_what_a_start_will_delete(
    path: Path, tmp_path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    """SESSION_TTL_S holds for a backup, too."""
    copy = tmp_path / "copy"
    clocks.set_by -= 4000
    life = kept(path, clocks, "a")
    clocks.now += 3500
    life.say("b")
    life.end()
    assert main.run(["sessions", "backup", str(copy)]) == 0
    assert main.run(["sessions", "restore", str(copy)]) == 0
    assert "restored 2 sessions into" in (line := capsys.readouterr().out.splitlines()[-1])
    assert "1 of them unused for longer than SESSION_TTL_S=3600: a start deletes them; the previous file is" in line


def test_a_restore_waits_for_no_service(
    path: Path, tmp_path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    """While one has the file, it says which, and changes nothing."""
    copy = tmp_path / "copy"
    kept(copy, clocks, "b").end()
    with running(path) as pid:
        assert f"is in use by process {pid}; stop it first" in refused(capsys, "restore", copy)
        assert not list(path.parent.glob("*.re*"))
    assert said(Life(path, clocks, ttl_s=3600), "a")


def test_what_is_no_backup_is_not_restored(
    path: Path, tmp_path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file in place stays what it was."""
    kept(path, clocks, "a").end()
    before = path.read_bytes()
    notes, other, empty = tmp_path / "notes.txt", tmp_path / "other.db", tmp_path / "empty"
    notes.write_text("my notes, which are longer than a header\n" * 9)
    empty.touch()
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE session (x)")
    for file, reason in (
        (notes, "is not allowed: it is no database. Move it away, or name another file"),
        (other, "is not allowed: it is another program's database. Move it away, or name another file"),
        (empty, "is not allowed: it is an empty database"),
        (tmp_path, "is not allowed: it is no regular file"),
        (tmp_path / "none", "does not exist"),
    ):
        assert refused(capsys, "restore", file) == f"yap-text: FILE={str(file)!r} {reason}"
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) <= 4


def test_a_damaged_backup_is_not_restored(
    path: Path, tmp_path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file in place stays what it was, and nothing half-made is left."""
    copy = tmp_path / "copy"
    life = kept(path, clocks, "a")
    for number in range(30):
        life.say(f"session {number}", "many words " * 100)
    life.end()
    assert main.run(["sessions", "backup", str(copy)]) == 0
    whole = copy.read_bytes()
    copy.write_bytes(whole[:5000] + bytes(15_000) + whole[20_000:])
    assert refused(capsys, "restore", copy).startswith(f"yap-text: FILE={str(copy)!r} is damaged: ")
    assert not list(path.parent.glob("*.re*"))
    assert said(Life(path, clocks, ttl_s=3600), "a")


def test_a_backup_replaces_no_file(
    path: Path, tmp_path: Path, clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name must be new, in a folder that exists."""
    kept(path, clocks, "a").end()
    copy = tmp_path / "copy"
    copy.write_text("mine")
    assert refused(capsys, "backup", copy) == f"yap-text: FILE={str(copy)!r} is not allowed: it exists; name a new one"
    assert copy.read_text() == "mine"
    assert "cannot be written: No such file" in refused(capsys, "backup", tmp_path / "none" / "copy")


@pytest.mark.parametrize("arguments", [[], ["backup", "copy"], ["restore", "copy"]])
def test_without_a_session_file_it_is_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """Kept in memory, or not kept yet."""
    if arguments[:1] != ["restore"]:
        assert refused(capsys, *arguments) == f"yap-text: SESSION_STORE={str(path)!r} does not exist"
    monkeypatch.setenv("SESSION_STORE", "memory")
    assert "SESSION_STORE='memory' has no session file" in refused(capsys, *arguments)
