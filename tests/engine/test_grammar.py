"""engine/vllm/grammar.py: schemas that take too long to compile are found out in a process that can be killed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from made import with_template

from yaptext.dialogue.tools import ToolSet
from yaptext.engine.base import whose
from yaptext.engine.vllm.grammar import GrammarCheck
from yaptext.errors import BadMessage, RateLimited

SLOW = json.dumps({"type": "string", "minLength": 3000, "maxLength": 4000})
"""A second or more of compiling: it never comes from a tool set, which leaves out such lengths."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    with_template("gpt2", None).save_pretrained(place)
    return place


@pytest.fixture
async def check(folder: Path) -> AsyncIterator[GrammarCheck]:
    found = GrammarCheck(str(folder), 0, compile_s=5)
    yield found
    await found.aclose()


async def test_tools_pass(check: GrammarCheck) -> None:
    """Those that are built in, and one of the same process after it."""
    await check.check(ToolSet.from_file(None).schema)
    await check.check(ToolSet([{"name": "a"}]).schema)


async def test_what_takes_too_long_is_killed(folder: Path) -> None:
    """The next one finds a new process."""
    check = GrammarCheck(str(folder), 0, compile_s=0.000_1)
    try:
        with pytest.raises(BadMessage, match=r"takes more than .* s to compile"):
            await check.check(SLOW)
        check.compile_s = 30
        await check.check(ToolSet([{"name": "a"}]).schema)
    finally:
        await check.aclose()


async def test_what_cannot_be_compiled_is_told(check: GrammarCheck) -> None:
    """In the words of the grammar's library."""
    with pytest.raises(BadMessage, match="the grammar of the tools cannot be made: "):
        await check.check('{"type": "string", "pattern": "("}')


async def test_a_key_has_its_seconds(folder: Path) -> None:
    """Others go on."""
    check = GrammarCheck(str(folder), 0, compile_s=0.000_1, key_s=0.000_1)
    try:
        whose.set("greedy")
        with pytest.raises(BadMessage):
            await check.check(SLOW)
        with pytest.raises(RateLimited, match="new lists of tools took"):
            await check.check(SLOW)
        whose.set("other")
        with pytest.raises(BadMessage):
            await check.check(SLOW)
    finally:
        await check.aclose()


async def test_without_a_process_all_pass(tmp_path: Path) -> None:
    """A tokenizer that cannot be loaded: told in the log."""
    await GrammarCheck(str(tmp_path), 0).check(SLOW)
