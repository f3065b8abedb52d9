"""keyfile.py: what a line may say, and that no error shows one."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yaptext.errors import SettingsError
from yaptext.server.access import keyfile
from yaptext.server.access.keyfile import NO_LIMITS, Key, Limits

A, B = (hashlib.sha256(letter).hexdigest() for letter in (b"a", b"b"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def refusal(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError) as caught:
        keyfile.read(path, NO_LIMITS)
    return str(caught.value)


def test_a_line_is_a_name_a_hash_and_limits(path: Path) -> None:
    """What a line does not say comes from the defaults; comments and empty lines are nothing."""
    path.write_text(
        f"# ours\n\nphone.app-1_ sha256:{A} # since May\n  b\tsha256:{B}  connections=0 turns_per_minute=7\n"
    )
    assert keyfile.read(path, Limits(1, 2, 3, 4)) == [
        Key("phone.app-1_", hashlib.sha256(b"a").digest(), Limits(1, 2, 3, 4)),
        Key("b", hashlib.sha256(b"b").digest(), Limits(0, 7, 3, 4)),
    ]


def test_an_empty_file_has_no_keys(path: Path) -> None:
    """The last key may be removed."""
    path.write_text("# nobody\n")
    assert keyfile.read(path, NO_LIMITS) == []


@pytest.mark.parametrize(
    "line",
    [
        "secret",
        f"secret {A}",
        f"secret md5:{A}",
        f"secret sha256:{A[1:]}",
        f"secret sha256:{A}0",
        f"secret sha256:{A.upper()}",
        f"sec/ret sha256:{A}",
        f"sécret sha256:{A}",
        f"{'secret' * 11} sha256:{A}",
        f"secret sha256:{A} connections",
        f"secret sha256:{A} connections=-1",
        f"secret sha256:{A} connections=x",
        f"secret sha256:{A} connections=1000000000",
        f"secret sha256:{A} secret_limit=1",
        f"secret sha256:{A} connections=1 secret",
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_not_shown(path: Path, line: str) -> None:
    """It may hold a key that somebody pasted."""
    message = refusal(path, f"a sha256:{B}\n\n{line}\n")
    assert "line 3" in message and str(path) in message and "\n" not in message
    assert "secret" not in message and A[1:9] not in message


@pytest.mark.parametrize("line", [f"a sha256:{B}", f"b sha256:{A}", f"default sha256:{B}"])
def test_a_name_and_a_hash_are_there_once(path: Path, line: str) -> None:
    """Else one key would have another's sessions; `default` is the key of the environment."""
    assert "line 2: its name or hash is taken" in refusal(path, f"a sha256:{A}\n{line}\n")


def test_a_file_that_cannot_be_read_is_named(path: Path) -> None:
    """Missing, a folder, or no text."""
    with pytest.raises(SettingsError, match=r"YAP_TEXT_KEY_FILE='.*keys' cannot be read: No such file"):
        keyfile.read(path, NO_LIMITS)
    assert "is not UTF-8" in refusal(path, b"\xff\xfe")
    path.unlink()
    path.mkdir()
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        keyfile.read(path, NO_LIMITS)


@given(st.text())
def test_any_text_is_keys_or_one_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Nothing else comes out of a file."""
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(keyfile.read(path, NO_LIMITS), list)
    except SettingsError as error:
        assert str(error).count("\n") == 0


def test_a_new_key_is_random_and_the_file_has_its_hash_alone(path: Path) -> None:
    """256 bits, in letters that go into an address; only the owner reads the file that was made for it."""
    (first, _), (second, line) = keyfile.add("a", path), keyfile.add("b", path)
    assert first != second and len(first.removeprefix("yap_")) == 43
    assert [key.name for key in keyfile.read(path, NO_LIMITS)] == ["a", "b"]
    assert keyfile.read(path, NO_LIMITS)[1].hash == hashlib.sha256(second.encode()).digest()
    assert path.read_text().splitlines()[1] == line
    assert first not in path.read_text() and path.stat().st_mode & 0o777 == 0o600


def test_adding_keeps_what_is_there(path: Path) -> None:
    """Its mode, its comments, and a last line that has no end."""
    path.write_text(f"# ours\na sha256:{A} connections=2")
    path.chmod(0o644)
    keyfile.add("b", path)
    assert path.read_text().startswith(f"# ours\na sha256:{A} connections=2\nb sha256:")
    assert path.stat().st_mode & 0o777 == 0o644


def test_two_that_add_at_once_do_so_one_after_the_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name one is told that it is taken; the file stays as it should be."""
    path.write_text(f"a sha256:{A}")
    both, read = threading.Barrier(2), keyfile.text_of

    def read_together(path: Path) -> str:
        text = read(path)
        with suppress(threading.BrokenBarrierError):  # one that waits for the other has not read yet
            both.wait(0.5)
        return text

    monkeypatch.setattr(keyfile, "text_of", read_together)

    def add(_: int) -> bool:
        try:
            keyfile.add("b", path)
        except SettingsError as error:
            assert "is taken" in str(error)
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(add, range(2))) == [False, True]
    assert [key.name for key in keyfile.read(path, NO_LIMITS)] == ["a", "b"]


def test_a_line_is_there_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the file is as it was, and the error names it."""
    path.write_text(f"a sha256:{A}\n")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("yaptext.server.access.keyfile.os.fsync", full)
    with pytest.raises(SettingsError, match="keys cannot be written: No space left"):
        keyfile.add("b", path)
    assert path.read_text() == f"a sha256:{A}\n"


def test_a_name_that_is_never_allowed_makes_no_file(path: Path) -> None:
    """Nothing is left of an attempt."""
    with pytest.raises(SettingsError):
        keyfile.add("default", path)
    assert not path.exists()


def test_a_name_that_is_taken_or_wrong_adds_nothing(path: Path) -> None:
    """The error names the value; a file that is damaged already is not added to."""
    keyfile.add("a", path)
    before = path.read_text()
    for name in ("a", "default", "", "a b", "a\n", "ä", "x" * 65):
        with pytest.raises(SettingsError):
            keyfile.add(name, path)
    assert path.read_text() == before
    path.write_text("broken\n")
    with pytest.raises(SettingsError, match="line 1"):
        keyfile.add("b", path)
    assert path.read_text() == "broken\n"
    with pytest.raises(SettingsError, match="cannot be written"):
        keyfile.add("b", path / "below")


def test_without_a_file_there_is_a_line_to_add() -> None:
    """For a file on another machine."""
    key, line = keyfile.add("a", None)
    assert line == f"a sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def test_a_fifo_is_no_key_file(tmp_path: Path) -> None:
    """It would never open."""
    os.mkfifo(tmp_path / "keys")
    with pytest.raises(SettingsError, match="cannot be read: it is no regular file"):
        keyfile.read(tmp_path / "keys", NO_LIMITS)
