"""What a bench found, as plain data: one result for each target, scenario and number of sessions, over all rounds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from yaptext.bench.figures import pooled
from yaptext.bench.run import Run
from yaptext.errors import YapError

FORMAT = 1
Result = dict[str, Any]


class ReportError(YapError):
    """A file of results cannot be read, or there is nothing in it to compare."""


class Place(NamedTuple):
    """What a result is of."""

    target: str
    scenario: str
    sessions: int

    @classmethod
    def of(cls, result: Result) -> Place:
        return cls(result["target"], result["scenario"], result["sessions"])


def result_of(runs: Sequence[Run]) -> Result:
    """The result of all rounds of one place."""
    first = runs[0]
    figures = pooled([run.samples() for run in runs])
    for name, rate in (("tokens_per_s", _tokens_per_s), ("cached_ratio", _cached_ratio)):
        whole = rate(runs)
        if whole is not None:
            figures[name] = {"value": whole, "rounds": {"value": [rate([run]) for run in runs]}}
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for run in runs:
        counts.update(run.counts)
        counts["turns"] += len(run.turns)
        counts["cancelled"] += sum(turn.outcome == "cancelled" for turn in run.turns)
        errors.update(run.errors)
        errors.update(turn.error for turn in run.turns if turn.error)
    return {
        **Place(first.target.name, first.scenario, first.sessions)._asdict(),
        "figures": figures,
        "counts": dict(counts),
        "errors": dict(errors),
        "seconds": [round(run.seconds, 2) for run in runs],
        "client_cpu": round(max(run.client_cpu for run in runs), 3),
        "notes": list(dict.fromkeys(note for run in runs for note in run.notes)),
    }


def _tokens_per_s(runs: Sequence[Run]) -> float | None:
    """From the first `start` of a run to its last frame; a server that tells no usage is counted by frames."""
    tokens, seconds = 0, 0.0
    for run in runs:
        ends = [turn.last_at for turn in run.turns if turn.last_at is not None]
        if ends:
            tokens += sum(turn.completion_tokens or len(turn.arrivals) for turn in run.turns)
            seconds += max(ends) - min(turn.sent_at for turn in run.turns)
    return round(tokens / seconds, 1) if seconds > 0 else None


def _cached_ratio(runs: Sequence[Run]) -> float | None:
    turns = [turn for run in runs for turn in run.turns if turn.cached_tokens is not None and not turn.part]
    prompt = sum(turn.prompt_tokens for turn in turns)
    return round(sum(turn.cached_tokens or 0 for turn in turns) / prompt, 4) if prompt else None


def statistic(result: Result, figure: str) -> tuple[float, list[float | None]] | None:
    """A figure by its address, `ttft_ms.p95` or `tokens_per_s`: its value, and its value in each round (None in a
    round without one)."""
    name, _, which = figure.partition(".")
    found = result["figures"].get(name)
    which = which or "value"
    if found is None or which not in found:
        return None
    return found[which], found["rounds"].get(which, [])


def load(path: Path) -> dict[str, Any]:
    """Raises `ReportError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict) or content.get("bench") != FORMAT or not isinstance(content.get("results"), list):
        raise ReportError(f"{path} is not a result of yap-text bench (format {FORMAT})")
    return content


def write(path: Path, text: str) -> None:
    """Raises `ReportError`."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error}") from None
