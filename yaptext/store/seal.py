"""The encryption of the session file: nothing in its rows can be read without the secret."""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any

import msgspec

from yaptext.store.base import SessionKey, SessionRecord


class Seal:
    """Ids and bodies of rows: with a secret unreadable and unchangeable without it (AES-256-GCM), else plain JSON."""

    def __init__(self, secret: str | None) -> None:
        self.cipher: Any = None
        self._id_key = b""
        if secret is not None:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            # Slow on purpose: a secret may be a sentence.
            keys = hashlib.scrypt(secret.encode(), salt=b"yap-text sessions", n=2**14, r=8, p=1, dklen=64)
            self.cipher, self._id_key = AESGCM(keys[:32]), keys[32:]

    def id(self, key: SessionKey) -> bytes:
        # Also of a name that is no text: it must not hold up the others' rows.
        return hmac.digest(self._id_key, "\0".join(key).encode(errors="surrogatepass"), "sha256")

    def close(self, id: bytes, kept: SessionRecord) -> bytes:
        body = msgspec.json.encode(kept)
        if self.cipher is None:
            return body
        nonce = os.urandom(12)
        return nonce + bytes(self.cipher.encrypt(nonce, body, id))

    def open(self, id: bytes, body: bytes) -> SessionRecord:
        """Raises as `SessionRecord.decode`, and what the cipher raises for one of another secret."""
        if self.cipher is not None:
            body = self.cipher.decrypt(body[:12], body[12:], id)
        return SessionRecord.decode(body)
