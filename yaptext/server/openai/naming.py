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
            return SessionName(name[:_MOST_CHARS], name[:_MOST_CHARS])
    if not user:
        return None
    hashed = hashlib.blake2b(user.encode(errors="replace"), key=_LOG_KEY, digest_size=8).hexdigest()
    return SessionName(user[:_MOST_CHARS], f"user-{hashed}")
