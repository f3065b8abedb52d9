"""API keys: who is calling, from the query, X-API-Key or Authorization."""

from __future__ import annotations

import hmac
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection

from yaptext.errors import AuthenticationFailed

KEY_NAME = "default"


class Keys:
    """The one key of `YAP_TEXT_API_KEY`. Keys are compared as bytes, in constant time."""

    def __init__(self, key: str) -> None:
        self._key = key.encode(errors="surrogateescape")  # the environment may hold any bytes

    def identify(self, connection: HTTPConnection) -> str:
        """The name of the caller's key. Raises `AuthenticationFailed`.

        Every key given is tried, so that a proxy's header does not hide a client's query.
        """
        given = [connection.headers.get("x-api-key")]
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(token.strip(" "))
        # latin-1: the bytes of the query as they came, whatever they are
        query = parse_qs(connection.scope.get("query_string", b"").decode("latin-1"), encoding="latin-1")
        candidates = [value.encode("latin-1", "replace") for value in given if value]
        candidates += [value.encode("latin-1") for value in query.get("api_key", [])]
        matches = [hmac.compare_digest(candidate, self._key) for candidate in candidates]
        if not any(matches):
            raise AuthenticationFailed
        return KEY_NAME
