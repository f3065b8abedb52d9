"""Plots as SVG inside a page, which has their colours as variables, for light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from io import StringIO
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from yaptext.bench.text import number

COLOURS = 8
_VARIABLES = ("page", "ink", "faint", "grid", *(f"c{colour}" for colour in range(COLOURS)))
_PAGE, _INK, _FAINT, _GRID, *_LINES = (f"#f00d{place:02x}" for place in range(len(_VARIABLES)))
"""Colours that stand for the page's variables until the SVG is written."""
_RULES = {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 8.5, "path.simplify": False}
_WIDTH, _ROW, _HEIGHT = 7.6, 0.22, 2.4
"""Of plots and of a row in one, in inches."""


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


def ranges(rows: Sequence[Row]) -> str:
    """A line from p50 to p99 for each row, a filled dot at p50, a ring at p95, a bar at p99; milliseconds."""
    figure, axes = _axes(_ROW * len(rows) + 0.35, left=0.33)
    for y, row in enumerate(rows):
        colour = _LINES[row.colour % COLOURS]
        named = f"title {row.label}: p50 {number(row.p50)}, p95 {number(row.p95)}, p99 {number(row.p99)} ms"
        axes.plot((row.p50, row.p99), (y, y), color=colour, gid=named)
        axes.plot((row.p99, row.p99), (y - 0.23, y + 0.23), color=colour)
        for x, fill in ((row.p50, colour), (row.p95, _PAGE)):  # one at a time: several would be links to one shape
            axes.scatter(x, y, 36, fill, edgecolors=colour, linewidths=1.5, zorder=3, gid=named)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], color=_INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return _svg(figure, axes, "x", [value for row in rows for value in row[2:]])


def curves(series: Sequence[Series]) -> str:
    """Shares of the samples (y, 0 to 1) that were at most so long (x, milliseconds)."""
    figure, axes = _axes(_HEIGHT)
    _draw(axes, series)
    axes.set_yticks((0.0, 0.5, 0.95, 1.0), ("0%", "50%", "95%", "100%"))
    return _svg(figure, axes, "x", [x for line in series for x, _ in line.points])


def over_sessions(series: Sequence[Series]) -> str:
    """Milliseconds (y) against numbers of sessions (x), which stand at even distances."""
    figure, axes = _axes(_HEIGHT)
    sessions = sorted({x for line in series for x, _ in line.points})
    _draw(axes, [line._replace(points=[(sessions.index(x), y) for x, y in line.points]) for line in series])
    axes.set_xticks(range(len(sessions)), [f"{count:g}" for count in sessions])
    return _svg(figure, axes, "y", [y for line in series for _, y in line.points])


def legend(labels: Sequence[tuple[str, int]]) -> str:
    entries = (f'<span class="c{colour % COLOURS}"><i></i>{escape(label)}</span>' for label, colour in labels)
    return f'<p class="legend">{"".join(entries)}</p>'


def _axes(height: float, left: float = 0.07) -> tuple[Figure, Any]:
    with rc_context(_RULES):
        figure = Figure((_WIDTH, height))
        axes = figure.add_axes((left, 0.3 / height, 0.97 - left, 1 - 0.35 / height), frameon=False)
        axes.grid(color=_GRID, linewidth=0.75)
        axes.tick_params(length=0, labelcolor=_FAINT)
    return figure, axes


def _draw(axes: Any, series: Sequence[Series]) -> None:
    for line in series:
        dashes = "--" if line.dashed else "-"
        colour = _LINES[line.colour % COLOURS]
        axes.plot(*zip(*line.points, strict=True), color=colour, linestyle=dashes, gid=f"title {line.label}")


def _svg(figure: Figure, axes: Any, logarithmic: str, values: Sequence[float]) -> str:
    """With one axis logarithmic, around all the `values`: 1, 2 and 5 of each power of ten, or all digits, or the powers
    alone, if those are few or crowded."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.12, max(positive) * 1.12
    axes.set(**{f"{logarithmic}scale": "log", f"{logarithmic}lim": (low, max(high, 2 * low))})
    axis, spread = getattr(axes, f"{logarithmic}axis"), high / low
    axis.set_major_locator(LogLocator(subs=range(1, 10) if spread < 6 else (1, 2, 5) if spread < 300 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for artist in figure.findobj():
        artist.set_clip_on(False)
    written = StringIO()
    with rc_context(_RULES):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    svg = re.sub(r'<g id="title ([^"]*)">', r"<g><title>\1</title>", svg[svg.index("<svg") :])
    svg = re.sub(r' (xmlns(:xlink)?|id|width|height)="[^"]*"', "", svg)
    return re.sub("#f00d(..)", lambda found: f"var(--{_VARIABLES[int(found[1], 16)]})", svg)
