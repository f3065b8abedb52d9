"""server/playground/pages.py: what is served, to whom, with which headers."""

from __future__ import annotations

import asyncio
import re
from http.client import HTTPConnection
from pathlib import Path

import pytest
from conftest import Running, service
from fakes import ScriptedEngine

from yaptext.engine.base import Engines

SERVER = Path(__file__).resolve().parents[2] / "yaptext" / "server" / "playground"
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FILES = {
    "/client.js": "text/javascript; charset=utf-8",
    "/client.d.ts": "text/plain; charset=utf-8",
    "/playground/app.js": "text/javascript; charset=utf-8",
    "/playground/style.css": "text/css; charset=utf-8",
    "/playground/icon.svg": "image/svg+xml",
}


def engines() -> Engines:
    engine = ScriptedEngine()
    return Engines(chat=engine, tool=engine)


async def get(running: Running, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    def ask() -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", running.server.bound_port, timeout=60)
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        with connection.getresponse() as answer:
            found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    return await asyncio.to_thread(ask)


async def test_every_file_has_its_type_and_an_etag() -> None:
    """A browser runs a module only with its type, and loads an unchanged file once."""
    async with service(engines()) as running:
        for path, media_type in FILES.items():
            status, headers, body = await get(running, path)
            assert (status, headers["content-type"], headers["x-content-type-options"]) == (200, media_type, "nosniff")
            assert body and headers["cache-control"] == "no-cache"
            status, _, body = await get(running, path, If_None_Match=headers["etag"])
            assert (status, body) == (304, b"")


async def test_the_client_can_be_imported_by_pages_of_other_sites() -> None:
    """It needs no key. The page's own parts, and tickets, are for nobody else."""
    async with service(engines()) as running:
        assert (await get(running, "/client.js"))[1]["access-control-allow-origin"] == "*"
        for path in ("/", "/playground/app.js", "/ticket"):
            assert "access-control-allow-origin" not in (await get(running, path, **HTML))[1]


async def test_the_page_is_for_browsers() -> None:
    """Whatever does not ask for HTML finds nothing at `/`."""
    async with service(engines()) as running:
        status, headers, body = await get(running, "/", **HTML)
        assert (status, headers["content-type"], headers["vary"]) == (200, "text/html; charset=utf-8", "Accept")
        assert body.startswith(b"<!doctype html>")
        assert (await get(running, "/", Accept="*/*"))[0] == 404
        assert (await get(running, "/"))[0] == 404


async def test_the_policy_allows_nothing_inline_and_nothing_from_outside() -> None:
    """Scripts, styles and connections are the service's own. No page may frame it."""
    async with service(engines()) as running:
        _, headers, body = await get(running, "/", **HTML)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["img-src"] == "'self'"
    assert headers["referrer-policy"] == "no-referrer"
    for text in (body.decode(), *(file.read_text(encoding="utf-8") for file in SERVER.glob("*.[cjs][ssv]*"))):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), "something from outside"


@pytest.mark.parametrize(("key", "shown"), [("yap_token", True), ("a-key-of-mine", False)])
async def test_no_key_but_the_default_one_is_in_the_page(key: str, shown: bool) -> None:
    """Everybody knows the default key, and with it the service is on loopback only."""
    async with service(engines(), YAP_TEXT_API_KEY=key) as running:
        _, _, body = await get(running, "/", **HTML)
        assert (key.encode() in body) is shown


async def test_playground_0_leaves_only_the_client() -> None:
    """PLAYGROUND=0: an operator who wants no page has none; pages of his own still find the client."""
    async with service(engines(), PLAYGROUND=0) as running:
        for path in ("/", "/playground/app.js", "/playground/style.css", "/playground/icon.svg"):
            assert (await get(running, path, **HTML))[0] == 404
        assert (await get(running, "/client.js"))[0] == 200


@pytest.mark.parametrize("path", ["/", *FILES])
async def test_on_loopback_other_names_are_refused(path: str) -> None:
    """As for every route without a key: no site shows the page as its own by DNS rebinding."""
    async with service(engines(), ALLOWED_HOSTS="yap.example.com") as running:
        assert (await get(running, path, Host="evil.example", **HTML))[0] == 403
        for host in ("localhost:8000", "127.0.0.1", "yap.example.com"):
            assert (await get(running, path, Host=host, **HTML))[0] == 200
