"""The page of `/docs` in Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import service
from fakes import ScriptedEngine
from playground.conftest import Tab

from yaptext.engine.base import Engines

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
async def test_the_page_is_readable_by_everybody(tab: Tab, tmp_path: Path, scheme: str, width: int) -> None:
    """axe finds nothing, nothing is wider than a phone, its style is allowed, and it asks for nothing else."""
    from axe_playwright_python.async_playwright import Axe

    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        await tab.page.set_viewport_size({"width": width, "height": 800})
        await tab.page.emulate_media(color_scheme=scheme)
        await tab.page.goto(f"{running.http}/docs")
        assert await tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert await tab.page.evaluate("getComputedStyle(document.querySelector('article')).borderRadius") != "0px"
        await tab.page.screenshot(path=tmp_path / f"docs-{scheme}-{width}.png")
        await tab.page.click("nav a >> text=Error codes")
        assert tab.page.url.endswith("#codes")
        assert {url.partition("#")[0] for url in tab.asked} <= {f"{running.http}/docs", f"{running.http}/favicon.ico"}
        found = (await Axe().run(tab.page)).response["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"][:200]) for rule in found] == []
