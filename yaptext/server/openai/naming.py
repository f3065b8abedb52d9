"""The session of a request, by the names that OpenAI's clients give."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any, NamedTuple

_MOST_CHARS = 128
_LOG_KEY = secrets.token_bytes(32)
"""Of this process: without a secret key, anybody could make the hash of an address and compare."""


class SessionName(NamedTuple):
    id: str
    in_log: str
    """`user` may be a person's address: the log has a keyed hash of it."""


def session_name(metadata: dict[str, Any] | None, cache_key: str | None, user: str | None) -> SessionName | None:
    for name in ((metadata or {}).get("session_id"), cache_key):
        if isinstance(name, str) and name:
            return SessionName(_id(name), _id(name))
    if not user:
        return None
    hashed = hashlib.blake2b(_bytes(user), key=_LOG_KEY, digest_size=8).hexdigest()
    return SessionName(_id(user), f"user-{hashed}")


def _id(name: str) -> str:
    """Names that are too long may begin alike."""
    return name if len(name) <= _MOST_CHARS else f"sha-{hashlib.sha256(_bytes(name)).hexdigest()}"


def _bytes(name: str) -> bytes:
    return name.encode(errors="replace")
