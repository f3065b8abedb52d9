"""GET over HTTP with a short timeout, through the proxies of the environment that is examined."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

TIMEOUT_S = 3.0
_MOST_BYTES = 4 * 2**20


class Answer(NamedTuple):
    """`status` is None if there was no answer; then `failure` says why."""

    status: int | None
    body: bytes = b""
    date: str | None = None
    failure: str = ""

    @property
    def json(self) -> Any:
        """The body, or None if it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class _KeepsTokens(urllib.request.HTTPRedirectHandler):
    """A token goes to the host that it is meant for, and to no other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            for name in ("Authorization", "X-api-key"):
                request.remove_header(name)
        return request


def proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Proxy by scheme; small letters win, as curl and the hub's client have it."""
    found = {}
    for scheme in ("http", "https", "all", "no"):
        name = f"{scheme}_proxy"
        if value := environ.get(name) or environ.get(name.upper()):
            found[scheme] = value
    return found


def get(url: str, headers: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None) -> Answer:
    """Never raises. Without an `environ` no proxy is asked."""
    named = proxies(environ or {})
    host = urlsplit(url).hostname or ""
    if urllib.request.proxy_bypass_environment(host, {"no": named.pop("no", "")}):  # type: ignore[attr-defined]
        named = {}
    if every := named.pop("all", None):
        named = {"http": every, "https": every} | named
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(named), _KeepsTokens())
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "yap-text doctor", **(headers or {})})
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return Answer(response.status, response.read(_MOST_BYTES), response.headers.get("Date"))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read(_MOST_BYTES), error.headers.get("Date"))
    except (OSError, HTTPException, ValueError) as error:
        return Answer(None, failure=_why(error))


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {reason.verify_message}"
    if isinstance(reason, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return type(reason).__name__ if isinstance(reason, Exception) else str(reason)
