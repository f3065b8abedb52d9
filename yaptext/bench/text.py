"""Results as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from yaptext.bench.figures import STATISTICS
from yaptext.bench.results import Place, Result

BUSY_CLIENT = 0.7
"""Share of a core from which on the bench itself may be what is slow."""


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns wide enough for what is in them; the first to the left, numbers to the right."""
    filled = [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*filled, strict=True)]
    lines = []
    for first, *rest in filled:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits, and no more than there is to tell."""
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def heading(place: Place) -> str:
    if place.scenario == "ramp":
        return f"ramp to {place.sessions} sockets at most, {place.target}"
    return f"{place.scenario}, {place.sessions} session{'s' if place.sessions > 1 else ''}, {place.target}"


def remarks(result: Result) -> list[str]:
    """What is to be known beside the figures, a sentence each."""
    counts, figures = result["counts"], result["figures"]
    told = [f"{counts['turns']} turns, {counts['cancelled']} cancelled, {counts.get('refusals', 0)} refused"]
    if "admitted" in counts and result["scenario"] == "ramp":
        told.append(f"{counts['admitted'] / len(result['seconds']):.0f} sockets admitted")
    if "tokens_per_s" in figures:
        told.append(f"{number(figures['tokens_per_s']['value'])} tokens/s")
    if "cached_ratio" in figures:
        told.append(f"{figures['cached_ratio']['value']:.1%} of the prompt tokens cached")
    told += [f"{count} x {code}" for code, count in sorted(result["errors"].items())]
    if counts.get("strays"):
        told.append(f"{counts['strays']} frames that violate the protocol")
    if result["client_cpu"] > BUSY_CLIENT:
        told.append(f"the bench itself used {result['client_cpu']:.0%} of a core: the figures may be its own")
    return told + list(result["notes"])


def report(content: dict[str, Any]) -> str:
    """All results of a bench."""
    parts = []
    for result in content["results"]:
        rows = [("ms", "count", *STATISTICS)]
        for name, figure in result["figures"].items():
            if "p50" in figure:
                rows.append((name.removesuffix("_ms"), str(figure["count"]), *(number(figure[s]) for s in STATISTICS)))
        parts.append(f"{heading(Place.of(result))}\n  {'; '.join(remarks(result))}\n{table(rows)}")
    return "\n\n".join(parts)
