"""The key file: named API keys, one a line, each as a hash and with limits of its own where it needs some.

    # NAME sha256:HASH [LIMIT=N ...]; a limit of 0 is none
    phone-app sha256:5e88...42d8
    partner sha256:0b14...03f1 connections=4 turns_per_minute=60

A key is 256 random bits, which nobody searches: its plain SHA-256 tells nothing of it. A slow hash makes passwords that
people think of dear to guess; here it would only let whoever knocks burn the service's CPU.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from yaptext.errors import SettingsError

OWN_NAME = "default"
"""Of the key in YAP_TEXT_API_KEY; no line may have it."""
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
    return list(_parse(_text(path), path, defaults))


def add(name: str, path: Path | None) -> tuple[str, str]:
    """A new key and its line, which is appended to `path` (made with mode 0600) where one is given.

    Raises `SettingsError` for a name that is wrong or taken, and where the file cannot be read or written."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"NAME={name!r} is not allowed: 1 to 64 of letters, digits, '.', '_' and '-'")
    key = f"yap_{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{hash_of(key.encode()).hex()}"
    if path is not None:
        before = _text(path) if path.exists() else ""
        addition = f"{line}\n" if before.endswith("\n") or not before else f"\n{line}\n"
        list(_parse(before + addition, path, NO_LIMITS))
        try:
            with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
                file.write(addition)
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    return key, line


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
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
