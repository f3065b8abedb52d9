"""The key file: named API keys, one a line, each as a hash, with limits of its own if it needs some.

    # NAME sha256:HASH [LIMIT=N ...]; a limit of 0 is none
    phone-app sha256:5e88...42d8
    partner sha256:0b14...03f1 connections=4 turns_per_minute=60

A key is 256 random bits, which cannot be searched: its plain SHA-256 reveals nothing. A slow hash makes passwords that
people choose expensive to guess; here it would only let strangers waste the service's CPU.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from yaptext.errors import SettingsError
from yaptext.files import read_file

OWN_NAME = "default"
"""Of the key in YAP_TEXT_API_KEY; no line may have it."""
_MOST_BYTES = 16 * 2**20
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_LINE = re.compile(rf"({_NAME.pattern})\s+sha256:([0-9a-f]{{64}})((?:\s+\w+=\d{{1,9}})*)", re.ASCII)


class Limits(NamedTuple):
    """What one key may have and do at once; 0 is no limit."""

    connections: int = 0
    turns_per_minute: int = 0
    messages_per_minute: int = 0
    cancels_per_minute: int = 0


NO_LIMITS = Limits()


class Key(NamedTuple):
    name: str
    hash: bytes
    limits: Limits


def hash_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read(path: Path, defaults: Limits) -> list[Key]:
    """The keys of a file. Raises `SettingsError`, which names the line and shows nothing of it."""
    return list(_parse(text_of(path), path, defaults))


def add(name: str, path: Path | None) -> tuple[str, str]:
    """A new key and its line, which is appended to `path` (made with mode 0600) where one is given. Of several
    processes that add at once, one does after the other, and a line is there whole or not at all.

    Raises `SettingsError` for a name that is wrong or taken, and where the file cannot be read or written."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"NAME={name!r} is not allowed: 1 to 64 of letters, digits, '.', '_' and '-'")
    key = f"yap_{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{hash_of(key.encode()).hex()}"
    if path is not None:
        list(_parse(line, path, NO_LIMITS))  # before a file is made for it
        try:
            # In place: another file under this name would have another owner and mode, and be no link that this one is.
            with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "rb+", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _append(file, line, path)
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    return key, line


def _append(file: io.FileIO, line: str, path: Path) -> None:
    before = text_of(path)
    addition = (f"{line}\n" if before.endswith("\n") or not before else f"\n{line}\n").encode()
    list(_parse(before + addition.decode(), path, NO_LIMITS))
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(addition) != len(addition):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def text_of(path: Path) -> str:
    try:
        return read_file(path, _MOST_BYTES).decode()
    except OSError as error:
        raise SettingsError(f"YAP_TEXT_KEY_FILE={str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise SettingsError(f"YAP_TEXT_KEY_FILE={str(path)!r} is not UTF-8") from None


def _parse(text: str, path: Path, defaults: Limits) -> Iterator[Key]:
    seen: set[str | bytes] = {OWN_NAME}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        matched = _LINE.fullmatch(content)
        limits = dict(pair.split("=") for pair in matched[3].split()) if matched else {}
        if not matched or not limits.keys() <= set(Limits._fields):
            wanted = f"NAME sha256:HASH [LIMIT=N ...], with limits of {', '.join(Limits._fields)}"
            raise SettingsError(f"YAP_TEXT_KEY_FILE={str(path)!r}, line {number}: not of the form {wanted}")
        key = Key(matched[1], bytes.fromhex(matched[2]), defaults._replace(**{k: int(n) for k, n in limits.items()}))
        if key.name in seen or key.hash in seen:
            raise SettingsError(
                f"YAP_TEXT_KEY_FILE={str(path)!r}, line {number}: its name or hash is taken "
                f"(a name is one key's; {OWN_NAME} is YAP_TEXT_API_KEY)"
            )
        seen |= {key.name, key.hash}
        yield key
