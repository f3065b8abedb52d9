"""The pages that the other tests leave: one for each client of the README's table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from clients.transcript import TITLES, Pages

pytestmark = [pytest.mark.clients, pytest.mark.engine]
README = Path(__file__).with_name("README.md")
NAMES = re.findall(r"^\| [\w ,]+ \| `(\w+)\.md` \|$", README.read_text(encoding="utf-8"), re.M)
ASKED = {"conversation": "capital of France", "tool": "weather in Oslo", "barge_in": "story about the sea"}
MAKERS = ("test_a_barge_in_ends_the_turn_within_a_second[vllm-", "test_barge_ins")


@pytest.fixture
def made(request: pytest.FixtureRequest, pages: Pages) -> Pages:
    """Those of this run, which has to be a whole one."""
    items = request.session.items
    whole = all(any(item.name.startswith(maker) for item in items) for maker in MAKERS)
    if request.config.getoption("keyword") or not whole:
        pytest.skip("the tests that write transcripts are not part of this run")
    return pages


def test_there_is_a_transcript_for_each_client(made: Pages) -> None:
    """And for no other."""
    assert {page.stem for page in made.folder.glob("*.md")} >= set(made.told) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_transcript_has_a_conversation_a_tool_call_and_a_barge_in(name: str, made: Pages) -> None:
    """What the user said, what was called and returned, and what a barge-in stopped. `llm` cannot force a call."""
    text = (made.folder / f"{name}.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", text, re.M))
    print(text)
    for scenario, asked in ASKED.items():
        section = sections[TITLES[scenario]]
        assert asked in section.partition("**User:**")[2]
        assert re.search(r"\*\*Assistant:\*\* \w+", section)
        if scenario == "conversation":
            assert section.count("**User:**") == section.count("**Assistant:**") == 2
        if scenario == "tool" and name != "llm":
            assert "**Assistant** calls `get_weather({" in section and "**Tool:** Sunny, 21 degrees." in section
        if scenario == "barge_in":
            assert "the client closes the stream" in section
            assert re.search(r"^\*The .* \d+ ms.* \d+ tokens\.\*$", section, re.M)
