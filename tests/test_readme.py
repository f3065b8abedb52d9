"""README.md: what it promises is held by tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
_NAMED = re.compile(r"`([\w/]+\.py)::([\w:]+)`")


def test_every_test_that_the_readme_names_exists() -> None:
    """A promise goes with its test; it is renamed, moved and removed with it."""
    named = _NAMED.findall((TESTS.parent / "README.md").read_text())
    assert len(named) > 20
    for file, name in named:
        inside = ast.parse((TESTS / file).read_text()).body
        for part in name.split("::"):
            (found,) = [node for node in inside if getattr(node, "name", None) == part] or [None]
            assert found is not None, f"{file} has no {name}"
            inside = getattr(found, "body", [])
