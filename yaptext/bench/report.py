"""Results as one HTML page: nothing is loaded from anywhere, and no script runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from yaptext.bench import plot
from yaptext.bench.compare import beside, shown
from yaptext.bench.figures import MEANINGS, STATISTICS
from yaptext.bench.results import Place, Result
from yaptext.bench.text import heading, number, remarks

_OVERVIEW = (
    ("ttft_ms", "First token"),
    ("first_sentence_ms", "First sentence"),
    ("decision_ms", "Decision"),
    ("inter_token_ms", "Between tokens"),
    ("total_ms", "Whole turn"),
    ("cancel_to_silence_ms", "Cancel to silence"),
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --faint: #6b7280; --grid: #e3e6eb; --page: #ffffff;
  --card: #f6f7f9; --c0: #2563eb;
  --c1: #d9480f; --c2: #0f8a5f; --c3: #9333ea; --c4: #b7791f; --c5: #c2255c; --c6: #0c8599; --c7: #5c677d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --faint: #9aa3b2; --grid: #2d333e; --page: #14171c;
  --card: #1b1f26; --c0: #7aa2ff; --c1: #ff9a62; --c2: #4cc796; --c3: #c79bff; --c4: #e5b567; --c5: #ff7fa8;
  --c6: #5cc8d8; --c7: #a3adbd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 820px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0; }
.faint, caption { color: var(--faint); font-size: .87rem; }
pre { overflow-x: auto; background: var(--card); padding: .75rem 1rem; border-radius: 8px; font-size: .82rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; }
abbr { text-decoration: none; border-bottom: 1px dotted var(--faint); cursor: help; }
svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .87rem; }
.legend i { display: inline-block; width: 1rem; height: .2rem; margin-right: .4rem; vertical-align: middle;
  background: var(--c); }
""" + "".join(f".c{index} {{ --c: var(--c{index}); }}\n" for index in range(plot.COLOURS))


def page(content: dict[str, Any]) -> str:
    """The page of one bench, as `Campaign.report` gives it."""
    results: list[Result] = content["results"]
    plan = content["plan"]
    where = ", ".join(f"{name} at {url}" for name, url in content["targets"].items())
    parts = [
        "<h1>yap-text bench</h1>",
        f'<p class="faint">{escape(content["begun"])}, version {escape(content["version"])}: {escape(where)}. '
        f"{plan['rounds']} rounds, {plan['turns']} turns a session, about {plan['persona_tokens']} tokens of persona "
        f"and {plan['history_tokens']} of history, replies of at most {plan['sampling']['max_tokens']} tokens.</p>",
        *_beside(content),
        *_overview(results),
        *_by_sessions(results),
    ]
    for scenario in dict.fromkeys(result["scenario"] for result in results):
        parts += _scenario(scenario, [result for result in results if result["scenario"] == scenario])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>yap-text bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _beside(content: dict[str, Any]) -> Iterator[str]:
    """The service in ratio to the peer, where one was measured along."""
    target, *others = content["targets"]
    for other in others:
        ratios = beside(content, target, other)
        if ratios:
            yield f"<h2>{escape(target)} beside {escape(other)}</h2><pre>{escape(shown(ratios, other, target))}</pre>"


def _overview(results: Sequence[Result]) -> Iterator[str]:
    colours = _colours(results)
    for name, title in _OVERVIEW:
        rows = [
            plot.Row(heading(Place.of(result)), colours[result["target"]], figure["p50"], figure["p95"], figure["p99"])
            for result in results
            if (figure := result["figures"].get(name))
        ]
        if rows:
            yield f'<h2>{title}</h2><p class="faint">{_html(MEANINGS[name])}; p50 (dot), p95 (ring), p99 (bar)</p>'
            yield plot.ranges(rows)


def _by_sessions(results: Sequence[Result]) -> Iterator[str]:
    colours = _colours(results)
    for scenario in dict.fromkeys(result["scenario"] for result in results):
        series = []
        for target in colours:
            found = [
                r for r in results if (r["scenario"], r["target"]) == (scenario, target) and "ttft_ms" in r["figures"]
            ]
            found.sort(key=lambda result: result["sessions"])
            for which, dashed in (("p50", False), ("p95", True)):
                points = [(result["sessions"], result["figures"]["ttft_ms"][which]) for result in found]
                series.append(plot.Series(f"{target}, {which}", colours[target], points, dashed))
        if max(len(line.points) for line in series) > 1:
            yield f'<h2>First token over sessions, {escape(scenario)}</h2><p class="faint">ms; p50, and p95 dashed</p>'
            yield plot.legend(list(colours.items())) + plot.over_sessions(series)


def _scenario(scenario: str, results: Sequence[Result]) -> Iterator[str]:
    yield f"<h2>{escape(scenario)}</h2>"
    series = [
        plot.Series(heading(Place.of(result)), index, [(x, point / (len(curve) - 1)) for point, x in enumerate(curve)])
        for index, result in enumerate(results)
        if "ttft_ms" in result["figures"] and (curve := result["figures"]["ttft_ms"]["curve"])
    ]
    if series:
        yield '<p class="faint">share of the turns whose first token came within so many ms</p>'
        yield plot.legend([(line.label, line.colour) for line in series]) + plot.curves(series)
    for result in results:
        yield f"<h3>{escape(heading(Place.of(result)))}</h3><p>{_html('; '.join(remarks(result)))}.</p>{_table(result)}"


def _table(result: Result) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("ms", "count", *STATISTICS))
    rows = []
    for name, figure in result["figures"].items():
        if "p50" in figure:
            cells = "".join(f"<td>{number(figure[which])}</td>" for which in STATISTICS)
            rows.append(f"<tr><td>{_named(name)}</td><td>{figure['count']}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _named(figure: str) -> str:
    """The figure's name with its meaning; a part (`calm_ttft_ms`) has the meaning of the whole."""
    meaning = next((MEANINGS[name] for name in MEANINGS if figure.endswith(name)), "")
    return f'<abbr title="{escape(meaning)}">{escape(figure.removesuffix("_ms"))}</abbr>'


def _colours(results: Sequence[Result]) -> dict[str, int]:
    return {target: index for index, target in enumerate(dict.fromkeys(result["target"] for result in results))}


def _html(text: str) -> str:
    return escape(text.replace("`", ""))
