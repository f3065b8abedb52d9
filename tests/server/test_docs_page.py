"""server/reference/page.py: both documents as a page that needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from conftest import service
from fakes import ScriptedEngine

from yaptext.engine.base import Engines
from yaptext.server.reference.openapi import document as openapi
from yaptext.server.reference.page import page
from yaptext.wire.asyncapi import document as asyncapi

PAGE = page(openapi(), asyncapi())
_VOID = {"meta", "br", "link"}


class Reader(HTMLParser):
    """The elements of a page. Fails if they are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


READ = Reader(PAGE)


def test_every_route_frame_field_and_code_is_on_the_page() -> None:
    """What a program reads, a person reads."""
    for path, item in openapi()["paths"].items():
        for method in item:
            assert f"{method.upper()} {path}" in READ.text
    channel = asyncapi()["channels"]["ws"]
    for name in (*channel["messages"], *channel["x-close-codes"], *channel["x-error-codes"]):
        assert name in READ.text
    for document in (openapi(), asyncapi()):
        for schema in document["components"]["schemas"].values():
            for field, properties in schema.get("properties", {}).items():
                assert f"<dt><code>{field}</code></dt>" in PAGE
                assert properties.get("description", "").replace("`", "") in READ.text


def test_every_link_of_the_page_leads_somewhere() -> None:
    """To a place of its own, of which there is one, or to a document."""
    places = [attributes["id"] for _, attributes in READ.found if "id" in attributes]
    assert len(places) == len(set(places))
    for tag, attributes in READ.found:
        if tag == "a":
            target = attributes["href"] or ""
            assert target in ("/openapi.json", "/asyncapi.json") or target.removeprefix("#") in places, target


def test_the_page_has_no_script_and_nothing_from_outside() -> None:
    """It loads nothing at all."""
    assert {tag for tag, _ in READ.found}.isdisjoint({"script", "img", "link", "iframe", "form"})
    assert not any(name.startswith("on") or name in ("src", "style") for _, them in READ.found for name in them)
    assert not re.search(r"https?://", PAGE)


def test_text_of_a_document_is_no_markup() -> None:
    """Whatever stands in a description."""
    shown: Any = asyncapi()
    shown["components"]["messages"]["ping"]["summary"] = "<b>bold</b> & `<i>`"
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; <code>&lt;i&gt;</code>" in page(openapi(), shown)


@pytest.mark.parametrize("playground", [0, 1])
async def test_the_documents_and_the_page_are_served_without_a_key(playground: int) -> None:
    """Also without the playground. The policy allows the page its own style, and nothing else."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine), PLAYGROUND=playground) as running, httpx.AsyncClient() as client:
        assert (await client.get(f"{running.http}/openapi.json")).json() == openapi()
        assert (await client.get(f"{running.http}/asyncapi.json")).json() == asyncapi()
        answer = await client.get(f"{running.http}/docs")
        assert (answer.status_code, answer.text) == (200, PAGE)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy.pop("style-src").startswith("'sha256-")
        assert set(policy.values()) == {"'none'"} and "default-src" in policy
        again = await client.get(f"{running.http}/docs", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        refused = await client.get(f"{running.http}/docs", headers={"Host": "evil.example"})
        assert refused.status_code == 403
