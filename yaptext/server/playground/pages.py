"""The routes of the playground, with the browser client that it uses."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from yaptext.server import http
from yaptext.server.playground.prompt import prompt
from yaptext.settings import DEFAULT_API_KEY, Settings

_HERE = Path(__file__).parent
_CLIENT = _HERE.parents[1] / "client" / "browser"
_JAVASCRIPT = "text/javascript; charset=utf-8"
_KEY = '<meta name="yap-text-key" content="">'
_SAFE = {"X-Content-Type-Options": "nosniff"}
_OF_THE_CLIENT = _SAFE | {"Access-Control-Allow-Origin": "*"}
"""A page of any site may import the client: it is the same for everybody, and opens nothing without a ticket."""
_OF_THE_PAGE = _SAFE | {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
}


def routes(settings: Settings) -> list[BaseRoute]:
    """`/client.js` with its types; with PLAYGROUND also `/`, what that page loads, and what it asks for."""
    client = [
        Route("/client.js", http.file((_CLIENT / "yap.js").read_bytes(), _JAVASCRIPT, _OF_THE_CLIENT)),
        Route(
            "/client.d.ts", http.file((_CLIENT / "yap.d.ts").read_bytes(), "text/plain; charset=utf-8", _OF_THE_CLIENT)
        ),
    ]
    if not settings.playground:
        return list(client)
    parts = {"app.js": _JAVASCRIPT, "style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}
    page = http.file(_page(settings), "text/html; charset=utf-8", _OF_THE_PAGE)

    async def playground(request: Request) -> Response:
        """For browsers; other clients find nothing at `/`, as before there was a page."""
        if "text/html" not in request.headers.get("accept", ""):
            raise HTTPException(404)
        return await page(request)

    return [
        *client,
        Route("/", playground),
        Route("/playground/prompt", prompt, methods=["POST"]),
        *(
            Route(f"/playground/{name}", http.file((_HERE / name).read_bytes(), media_type, _SAFE))
            for name, media_type in parts.items()
        ),
    ]


def _page(settings: Settings) -> bytes:
    """With the default key in it, if that is in force: it is no secret, and works on this machine alone."""
    html = (_HERE / "index.html").read_text(encoding="utf-8")
    assert html.count(_KEY) == 1
    if settings.own_key == DEFAULT_API_KEY:
        html = html.replace(_KEY, _KEY.replace('""', f'"{DEFAULT_API_KEY}"'))
    return html.encode()
