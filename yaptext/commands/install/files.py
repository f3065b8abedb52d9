"""Installs, changes or removes one file in one step, and prints a line about it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from yaptext.errors import YapError

_MARK = "# As installed, until this file is edited: "


class InstallError(YapError):
    """Something could not be installed; the message says what to do."""


def put_all(texts: Mapping[Path, str], mode: int) -> bool:
    """Writes the files that differ, all or none; prints them, and returns whether there were any. A full disk fails the
    writing of the parts: a rename needs no space."""
    words = {path: _word(path, text) for path, text in texts.items()}
    new = [path for path, word in words.items() if word != "unchanged"]
    try:
        for path in new:
            _write_part(path, texts[path], mode)
    except InstallError:
        for path in new:
            with suppress(OSError):
                _part(path).unlink()
        raise
    for path, word in words.items():
        if path in new:
            _finish(path)
        tell(word, path)
    return bool(new)


def _word(path: Path, text: str) -> str:
    """The word for writing the text: installed, updated or unchanged."""
    if not path.exists():
        return "installed"
    return "unchanged" if path.read_text() == text else "updated"


def put_config(path: Path, template: str, mode: int) -> None:
    """Writes a config unless it was edited; then a newer template is put beside it."""
    text = _stamped(template)
    current = path.read_text() if path.exists() else None
    if current is None or not is_edited(current):
        put_all({path: text}, mode)
    elif _mark_of(current) == _digest(template):
        tell("kept", path, "edited")
    else:
        beside = path.with_name(f"{path.name}.new")
        tell("kept", path, f"edited; today's template is {beside.name}")
        put_all({beside: text}, mode)


def put_once(path: Path, text: str, what: str, mode: int = 0o600) -> None:
    """Writes a secret if there is none."""
    if path.exists():
        tell("kept", path)
    else:
        _write_part(path, text, mode)
        _finish(path)
        tell("installed", path, what)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _stamped(template: str) -> str:
    """Adds a last line with the digest of the template."""
    return f"{template}{_MARK}{_digest(template)}\n"


def _mark_of(text: str) -> str | None:
    """The digest of the template that the file was made from; lines may have been added after it."""
    marks: list[str] = re.findall(f"^{re.escape(_MARK)}(.*)$", text, re.MULTILINE)
    return marks[-1] if marks else None


def is_edited(text: str) -> bool:
    return text != _stamped(text.rpartition(_MARK)[0])


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _write_part(path: Path, text: str, mode: int) -> None:
    """Writes beside the file, never with more rights than `mode`. `_finish` renames it."""
    with changing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(_part(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)


def _finish(path: Path) -> None:
    with changing(path):
        _part(path).replace(path)


def link(path: Path, target: Path, why: str = "") -> bool:
    """Makes the link, or changes its target in one step; prints that, and returns whether it was necessary."""
    before = path.readlink() if path.is_symlink() else None
    if before == target:
        tell("unchanged", path)
        return False
    with changing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _part(path).unlink(missing_ok=True)
        _part(path).symlink_to(target)
    _finish(path)
    tell("updated" if before else "installed", path, why or f"to {target}")
    return True


def remove(path: Path) -> None:
    if path.exists() or path.is_symlink():
        with changing(path):
            path.unlink()
        tell("removed", path)


@contextmanager
def changing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InstallError(f"{path} cannot be written: {error.strerror}") from None


def tell(word: str, path: Path, why: str = "") -> None:
    print(f"{word:<10} {path}" + (f" ({why})" if why else ""))
