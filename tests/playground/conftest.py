"""Headless Chromium for the tests of the playground and of the browser client."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import pytest_asyncio

_PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_LACKING = (
    "Chromium (Debian: chromium)"
    if _PROGRAM is None
    else "The package playwright"
    if not find_spec("playwright")
    else None
)


@pytest.fixture
def chromium() -> str:
    """The program. Without it these tests are skipped, but not in CI."""
    if _LACKING is None:
        assert _PROGRAM is not None
        return _PROGRAM
    if os.environ.get("CI"):
        pytest.fail(f"{_LACKING} is missing, and CI needs it")
    pytest.skip(f"{_LACKING} is missing")


class Tab:
    """A page, and what it complained of: a test fails if that is more than what it allows."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.allowed: tuple[str, ...] = ()
        self.asked: list[str] = []
        """Every address that the page asked for."""
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("websocket", lambda socket: self.asked.append(socket.url))

    def hear(self, message: Any) -> None:
        # Chromium asks for this of every page that is not HTML, as those are that tests of the client run in.
        if message.type in ("error", "warning") and not message.location["url"].endswith("/favicon.ico"):
            self.complaints.append(message.text)

    def check(self) -> None:
        assert [text for text in self.complaints if not any(part in text for part in self.allowed)] == []


@asynccontextmanager
async def _browsing(chromium: str) -> AsyncIterator[Tab]:
    """A page without a past. Violations of the policy, errors and warnings of the console fail the test."""
    from playwright.async_api import async_playwright

    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        made = Tab(await browser.new_page(viewport={"width": 1280, "height": 800}))
        made.page.set_default_timeout(20_000)
        yield made
        await browser.close()
    made.check()


@pytest_asyncio.fixture
async def tab(chromium: str) -> AsyncIterator[Tab]:
    async with _browsing(chromium) as made:
        yield made


@pytest.fixture
def browsing(chromium: str) -> Callable[[], AbstractAsyncContextManager[Tab]]:
    """For a test that runs in another loop than its fixtures."""
    return partial(_browsing, chromium)
