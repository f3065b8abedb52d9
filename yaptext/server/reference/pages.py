"""The routes of the documents, for programs and for readers."""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256

from starlette.routing import Route

from yaptext.server import http
from yaptext.server.reference import openapi
from yaptext.server.reference.page import STYLE, page
from yaptext.wire import asyncapi

_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@cache
def routes() -> tuple[Route, ...]:
    """The same for every app: nothing depends on a setting."""
    for_http, for_ws = openapi.document(), asyncapi.document()
    return (
        Route("/openapi.json", http.document(for_http)),
        Route("/asyncapi.json", http.document(for_ws)),
        Route("/docs", http.file(page(for_http, for_ws).encode(), "text/html; charset=utf-8", _HEADERS)),
    )
