"""Plots as SVG. Colours are classes, which the page around them defines for light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from yaptext.bench.text import number

_WIDTH = 760
_ROW = 22
_LABELS = 250
"""Width of the row labels of `ranges`."""
_MARGIN = 40
COLOURS = 8


class Row(NamedTuple):
    """One line of a range plot."""

    label: str
    colour: int
    p50: float
    p95: float
    p99: float


class Series(NamedTuple):
    """One line of a curve or of a plot over sessions."""

    label: str
    colour: int
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class _Log:
    """A logarithmic axis from pixel `start` to `end`, around all the values."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        positive = [value for value in values if value > 0] or [1.0]
        self._low = math.log10(min(positive)) - 0.05
        self._high = max(math.log10(max(positive)) + 0.05, self._low + 0.3)
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low) if value > 0 else 0.0
        return self._start + min(1.0, max(0.0, share)) * (self._end - self._start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """1, 2 and 5 of each power of ten; every digit, or the powers alone, where that is few or crowded."""
        decades = self._high - self._low
        steps = range(1, 10) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1,)
        for power in range(math.floor(self._low), math.ceil(self._high) + 1):
            for step in steps:
                value = step * 10.0**power
                if self._low <= math.log10(value) <= self._high:
                    yield self.at(value), f"{value:g}"


def ranges(rows: Sequence[Row]) -> str:
    """A line from p50 to p99 for each row, a filled dot at p50, a ring at p95, a bar at p99; milliseconds."""
    bottom = _ROW * len(rows) + 8
    axis = _Log([value for row in rows for value in row[2:]], _LABELS, _WIDTH - _MARGIN)
    parts = [_vertical(x, text, 4, bottom) for x, text in axis.ticks()]
    for index, row in enumerate(rows):
        y = _ROW * index + _ROW / 2 + 4
        x50, x95, x99 = axis.at(row.p50), axis.at(row.p95), axis.at(row.p99)
        told = f"{row.label}: p50 {number(row.p50)}, p95 {number(row.p95)}, p99 {number(row.p99)} ms"
        parts.append(
            f'<g class="c{row.colour % COLOURS}"><title>{escape(told)}</title>'
            f'<text class="label" x="{_LABELS - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(row.label)}</text>'
            f'<line x1="{x50:.1f}" x2="{x99:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="full" cx="{x50:.1f}" cy="{y:.1f}" r="4.5"/>'
            f'<circle class="ring" cx="{x95:.1f}" cy="{y:.1f}" r="4"/>'
            f'<line x1="{x99:.1f}" x2="{x99:.1f}" y1="{y - 5:.1f}" y2="{y + 5:.1f}"/></g>'
        )
    return _svg(bottom + 22, parts)


def curves(series: Sequence[Series]) -> str:
    """Shares of the samples (y, 0 to 1) that were at most so long (x, milliseconds)."""
    top, bottom = 8, 220
    axis = _Log([x for line in series for x, _ in line.points], _MARGIN, _WIDTH - _MARGIN)
    parts = [_vertical(x, text, top, bottom) for x, text in axis.ticks()]
    for share in (0.0, 0.5, 0.95, 1.0):
        parts.append(_horizontal(bottom - share * (bottom - top), f"{share:.0%}"))
    for line in series:
        drawn = [(axis.at(x), bottom - y * (bottom - top)) for x, y in line.points]
        parts.append(_line(line, drawn))
    return _svg(bottom + 22, parts)


def over_sessions(series: Sequence[Series]) -> str:
    """Milliseconds (y) against numbers of sessions (x), which stand at even distances."""
    top, bottom = 8, 220
    sessions = sorted({x for line in series for x, _ in line.points})
    step = (_WIDTH - 3 * _MARGIN) / max(1, len(sessions) - 1)
    place = {count: 2 * _MARGIN + index * step for index, count in enumerate(sessions)}
    axis = _Log([y for line in series for _, y in line.points], bottom, top)
    parts = [_vertical(x, f"{count:g}", top, bottom) for count, x in place.items()]
    parts += [_horizontal(y, text) for y, text in axis.ticks()]
    for line in series:
        parts.append(_line(line, [(place[x], axis.at(y)) for x, y in line.points]))
    return _svg(bottom + 22, parts)


def legend(labels: Sequence[tuple[str, int]]) -> str:
    entries = (f'<span class="c{colour % COLOURS}"><i></i>{escape(label)}</span>' for label, colour in labels)
    return f'<p class="legend">{"".join(entries)}</p>'


def _line(series: Series, points: Sequence[tuple[float, float]]) -> str:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if series.dashed else ""
    return (
        f'<g class="c{series.colour % COLOURS}"><title>{escape(series.label)}</title>'
        f'<polyline points="{drawn}"{dashes}/></g>'
    )


def _vertical(x: float, text: str, top: float, bottom: float) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{escape(text)}</text>'
    )


def _horizontal(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_MARGIN - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
