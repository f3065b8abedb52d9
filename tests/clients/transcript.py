"""A client's conversations with real vLLM, as pages to read: `NAME.md` for each client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "models": "The models",
    "conversation": "Two turns",
    "whole": "A reply in one piece",
    "tool": "A tool call, its result, the answer",
    "barge_in": "A barge-in",
}


class Pages:
    """The pages of one test run. Pages of an earlier run are overwritten as soon as their client runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: dict[str, dict[str, list[dict[str, Any]]]] = {}
        """By client and scenario."""

    def add(self, name: str, scenario: str, told: Sequence[dict[str, Any]]) -> None:
        """`told` are the lines of `scripts/told.py`."""
        sections = self.told.setdefault(name, {})
        sections[scenario] = list(told)
        text = f"# {name}\n\nReal vLLM with the demo model, as `make test-clients` ran it.\n"
        for each in sections:
            text += f"\n## {TITLES[each]}\n\n" + "\n\n".join(_lines(sections[each])) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.md").write_text(text, encoding="utf-8")


def _lines(told: Sequence[dict[str, Any]]) -> Iterator[str]:
    called = False
    for line in told:
        match line["what"]:
            case "models":
                yield ", ".join(f"`{name}`" for name in line["ids"])
            case "asked":
                yield f"**User:** {line['said']}"
            case "calls":
                called = True
                yield "**Assistant** calls " + ", ".join(f"`{name}({given})`" for _, name, given in line["calls"])
            case "turn":
                if called and "result" in line:
                    yield f"**Tool:** {line['result']}"
                if "said" in line:
                    yield f"**User:** {line['said']}"
                yield f"**Assistant:** {_in_one(line['text'])}{_figures(line)}"
            case "closed":
                heard = f"{_in_one(line['heard'])} … " if line["heard"] else ""
                yield f"**Assistant:** {heard}*(the client closes the stream)*"
            case "seen":
                yield f"*{line['text']}*"


def _in_one(text: str) -> str:
    return " ".join(text.split())


def _figures(line: dict[str, Any]) -> str:
    units = {"pieces": "pieces", "cached": "prompt tokens from the cache", "ttft_ms": "ms to the first token"}
    found = [f"{line[name]:.0f} {unit}" for name, unit in units.items() if name in line]
    return f" *({', '.join(found)})*" if found else ""
