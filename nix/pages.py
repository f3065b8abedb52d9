"""Writes the tables of yaptext/SETTINGS.md and yaptext/observe/README.md out of the code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from yaptext.observe.metrics import Metrics
from yaptext.settings.table import variables

ROOT = Path(__file__).resolve().parents[1]


def replace_table(page: Path, heading: str, rows: Iterable[Sequence[str]]) -> None:
    """The rows below the heading become `rows`; the rest of the page stays."""
    made = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    text = page.read_text(encoding="utf-8")
    table = re.compile(rf"^({re.escape(heading)}\n\|[-|]+\|\n)(?:\|.*\n)*", re.M)
    text, found = table.subn(lambda match: match[1] + made, text)
    if found != 1:
        raise ValueError(f"{page} has {found} tables that begin with {heading}; 1 is needed")
    page.write_text(text, encoding="utf-8")


def code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    replace_table(
        ROOT / "yaptext" / "SETTINGS.md",
        "| variable | default | meaning |",
        ([code(name), code(default), meaning] for name, default, meaning in variables()),
    )
    replace_table(
        ROOT / "yaptext" / "observe" / "README.md",
        "| metric | labels | meaning |",
        ([code(name), ", ".join(map(code, labels)), meaning] for name, labels, meaning in Metrics().documented),
    )
