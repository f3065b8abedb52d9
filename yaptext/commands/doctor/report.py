"""The report of a run: lines for people, to paste into an issue as they are, or JSON for programs."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from yaptext.commands.doctor.check import FAILED, SKIPPED, Result
from yaptext.commands.doctor.deployment import Deployment

SCHEMA = 1
"""Of the JSON. It grows if a field changes its meaning or goes; new fields do not count."""


def as_json(seen: Deployment, results: Sequence[Result], seconds: float) -> str:
    """One object: `schema`, `version`, `settings` ("unit" or "shell"), `device`, `offline`, `seconds`, `counts` by
    status, and `checks` in order, each `name`, `group`, `status`, `found` and `remedy` (null unless warn or fail)."""
    checks = [
        {
            "name": name,
            "group": name.partition(".")[0],
            "status": finding.status,
            "found": _line(seen, finding.found),
            "remedy": None if finding.remedy is None else _line(seen, finding.remedy),
        }
        for name, finding in results
    ]
    whole: dict[str, Any] = {"schema": SCHEMA, "version": seen.machine.version, "settings": _source(seen)}
    whole |= {"device": _device(seen), "offline": seen.offline, "seconds": round(seconds, 2)}
    return json.dumps(whole | {"counts": counts(results), "checks": checks}, indent=1, ensure_ascii=False)


def as_text(seen: Deployment, results: Sequence[Result], seconds: float) -> str:
    """A headline, a line a check under its group, its remedy below, and the counts."""
    which = "those of the unit yap-text" if _source(seen) == "unit" else "those of this shell"
    lines = [f"yap-text {seen.machine.version} on {_device(seen).upper()}; settings: {which}"]
    for group, members in groupby(results, key=lambda result: result.name.partition(".")[0]):
        lines += ["", group]
        waiting = []
        for name, finding in members:
            if finding.status == "skip" and finding.found.endswith((SKIPPED, FAILED)):
                waiting.append(name.partition(".")[2])
                continue
            lines.append(f"  {finding.status:<5} {name.partition('.')[2]:<18} {_line(seen, finding.found)}")
            if finding.remedy is not None:
                lines.append(f"        -> {_line(seen, finding.remedy)}")
        if waiting:
            lines.append(
                textwrap.fill(f"not asked: {', '.join(waiting)}", 110, initial_indent="  ", subsequent_indent=" " * 13)
            )
    told = counts(results)
    lines += [
        "",
        f"{told['fail']} failed, {told['warn']} warnings, {told['ok']} ok, {told['skip']} skipped, {seconds:.1f} s",
    ]
    return "\n".join(lines)


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many checks ended in each status."""
    found = Counter(finding.status for _, finding in results)
    return {status: found[status] for status in ("ok", "warn", "fail", "skip")}


def _source(seen: Deployment) -> str:
    return "unit" if seen.installed is not None else "shell"


def _device(seen: Deployment) -> str:
    return "cuda" if seen.on_cuda else "cpu"


def _line(seen: Deployment, text: str) -> str:
    """One line, without secrets and without what would steer a terminal."""
    one = " ".join(text.split())
    return "".join(char if char.isprintable() else "\ufffd" for char in seen.hide(one))
