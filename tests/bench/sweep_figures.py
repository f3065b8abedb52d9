"""What `settings_sweep.py` measured, as summaries, tables and plots."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yaptext.bench.figures import summary
from yaptext.bench.text import number

_SIZES = (1, 8, 32, 64, 256, 512, 1024, 2048, 4096, 8192)

COLUMNS = (
    ("one: decision", "one", "decision_ms", ("p50", "p95")),
    ("first token", "one", "ttft_ms", ("p50", "p99")),
    ("spread: decision", "spread", "decision_ms", ("p50", "p95")),
    ("first token", "spread", "ttft_ms", ("p50", "p99")),
    ("between", "spread", "inter_token_ms", ("p50", "p99")),
    ("at once: decision", "at once", "decision_ms", ("p50", "p95")),
    ("first token", "at once", "ttft_ms", ("p50", "p99")),
    ("loading: between", "loading", "inter_token_ms", ("p50", "p99")),
    ("first token", "loading", "ttft_ms", ("p50", "p99")),
    ("cold first token", "loading", "cold_ttft_ms", ("p50", "p95")),
    ("cancelled", "cancel", "cancel_to_silence_ms", ("p50", "p99")),
)
"""Title, run, figure, statistics: what stands in the table, in milliseconds."""


def _summary(values: Iterable[float]) -> dict[str, Any] | None:
    values = list(values)
    if not values:
        return None
    found = summary(values)
    found.pop("curve")
    return found


def engine_steps(steps: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How long an engine's steps took, by how many tokens they computed. A step begins when it is scheduled, or when
    the one before it has ended."""
    by_size: defaultdict[int, list[float]] = defaultdict(list)
    last = 0.0
    for begun, ended, tokens, _ in steps:
        by_size[_SIZES[min(bisect.bisect_left(_SIZES, tokens), len(_SIZES) - 1)]].append(
            (ended - max(begun, last)) * 1000
        )
        last = ended
    return {f"<={size}": _summary(by_size[size]) for size in sorted(by_size)}


def freed(notes: Mapping[str, Any]) -> dict[str, Any]:
    """From the abort of a chat stream in the service until its KV blocks are free: milliseconds, and engine steps that
    began meanwhile."""
    chat = notes.get("chat", {})
    ended = {_plain(request): at for request, at in chat.get("freed", []) if request.startswith("1-")}
    begins = sorted(step[0] for step in chat.get("steps", []))
    took, steps = [], []
    for request, asked in notes.get("front", {}).get("aborts", []):
        if not isinstance(request, str):
            continue
        at = ended.get(request) or ended.get(_plain(request))
        if at is not None and at >= asked:
            took.append((at - asked) * 1000)
            steps.append(bisect.bisect(begins, at) - bisect.bisect(begins, asked))
    return {"ms": _summary(took), "steps": _summary(map(float, steps))}


def way(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Where the time of turns goes, in milliseconds from point to point: the frame there, an engine asked, the request
    there, its first step begun and ended, the decision out or the first text there, and that passed on. `late` is from
    the later of decision and text until the text was passed on. The chat engine's time in all begins with the decision.
    """
    hops: defaultdict[str, list[float]] = defaultdict(list)
    engines = {}
    for role in ("tool", "chat"):
        noted = notes.get(role, {})
        first = {_plain(request): (begun, ended) for request, begun, ended in noted.get("first", [])}
        engines[role] = {
            _plain(request): (at, *first.get(_plain(request), ())) for request, at in noted.get("added", [])
        }
    for turn in notes.get("front", {}).get("turns", []):
        last = turn["received"]
        for role, outcome in (("tool", "decided"), ("chat", "text")):
            request, asked = turn.get(role, (None, None))
            points = (asked, *engines[role].get(request, ()), turn.get(outcome))
            if len(points) != 5 or None in points:
                break
            names = ("asked", "there", "step begun", "step ended", outcome)
            for name, at in zip(names, points, strict=True):
                hops[f"{role} {name}"].append((at - last) * 1000)
                last = at
            begun = turn["received"] if role == "tool" else turn.get("decided", turn["received"])
            hops[f"{role} in all"].append((last - begun) * 1000)
        if "passed" in turn and "decided" in turn and "text" in turn:
            hops["late"].append((turn["passed"] - max(turn["decided"], turn["text"])) * 1000)
    return {name: _summary(values) for name, values in hops.items()}


def _plain(request: str) -> str:
    """vLLM puts chance behind a request's id."""
    return request.rsplit("-", 1)[0]


def figure(run: Mapping[str, Any] | None, name: str, statistic: str) -> float | None:
    found = (run or {}).get("client", {}).get("figures", {}).get(name)
    return None if found is None else found.get(statistic)


def rows(starts: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row a step, with the heading first."""
    found: list[tuple[str, ...]] = [("", *(f"{title} {' / '.join(statistics)}" for title, _, _, statistics in COLUMNS))]
    for start in starts:
        for step in start["steps"]:
            cells = []
            for _, run, name, statistics in COLUMNS:
                values = [figure(step["runs"].get(run), name, statistic) for statistic in statistics]
                cells.append(
                    "" if None in values else " / ".join(number(value) for value in values if value is not None)
                )
            if any(cells):
                found.append((f"{start['name']}, {step['name']}", *cells))
    return found


def render(starts: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Writes the plots into the folder; returns the tables as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (head, *body) = rows(starts)
    lines = [head, ("---",) * len(head), *body]
    _plot_tokens(starts, folder / "batched-tokens.svg")
    _plot_starts(starts, folder / "settings.svg")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _new(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "settings"  # the same data give the same file
    return Figure(figsize=(width, height), layout="constrained")


def _save(drawn: Any, file: Path) -> None:
    drawn.savefig(file, metadata={"Date": None})


def _plot_tokens(starts: Sequence[Mapping[str, Any]], file: Path) -> None:
    """What the tokens of an engine step cost and gain, of the starts with MPS."""
    runs: dict[tuple[str, str], Any] = {}
    for start in starts:
        for step in start["steps"] if start["start"]["mps"] is not None else ():
            runs |= {(step["name"], run): noted for run, noted in step["runs"].items()}

    def curve(names: Mapping[int, Sequence[str]], run: str, name: str, statistic: str) -> list[tuple[int, float]]:
        found = [
            (size, figure(runs.get((step, run)), name, statistic)) for size, steps in names.items() for step in steps
        ]
        return [(size, value) for size, value in found if value is not None]

    sizes = (256, 512, 1024, 2048, 8192)
    if not any(step in {f"{size}/2048" for size in sizes} for step, _ in runs):
        return
    chat = {size: [f"{size}/2048"] + [f"{size}/8192"] * (size == 512) for size in sizes}
    tool = {size: [f"2048/{size}"] for size in sizes}
    drawn = _new(9, 3.6)
    left, right = (
        drawn.add_subplot(1, 2, place, title=title) for place, title in ((1, "chat engine"), (2, "tool engine"))
    )
    left.plot(*_xy(curve(chat, "loading", "inter_token_ms", "p99")), "o-", label="stutter while prefixes load, p99")
    left.plot(*_xy(curve(chat, "loading", "ttft_ms", "p50")), "o-", label="first token of the others, p50")
    left.plot(*_xy(curve(chat, "loading", "ttft_ms", "p99")), "o-", label="the same, p99")
    left.plot(*_xy(curve(chat, "loading", "cold_ttft_ms", "p50")), "o-", label="first token of 3,000 cold, p50")
    right.plot(*_xy(curve(tool, "at once", "decision_ms", "p50")), "o-", label="32 decisions at once, p50")
    right.plot(*_xy(curve(tool, "at once", "decision_ms", "p95")), "o-", label="the same, p95")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="tokens a step", ylabel="ms")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        ticks = [20, 50, 100, 200, 500, 1000]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    _save(drawn, file)


def _xy(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plot_starts(starts: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Decision and first token by setting, from p50 to the last percentile."""
    found = []
    for start in starts:
        for step in start["steps"]:
            run = step["runs"].get("spread")
            decision = [figure(run, "decision_ms", statistic) for statistic in ("p50", "p95")]
            first = [figure(run, "ttft_ms", statistic) for statistic in ("p50", "p99")]
            if None not in (*decision, *first):
                found.append((f"{start['name']}, {step['name']}", decision, first))
    drawn = _new(9, 1.0 + 0.3 * max(1, len(found)))
    axes = drawn.add_subplot(xlabel="ms, 32 sessions spread over 2 s", xscale="log")
    for place, (_, decision, first) in enumerate(found):
        axes.plot(decision, [-place + 0.12] * 2, "o-", color="C0", label="" if place else "decision, p50 to p95")
        axes.plot(first, [-place - 0.12] * 2, "o-", color="C1", label="" if place else "first token, p50 to p99")
    axes.set_yticks([-place for place in range(len(found))], [label for label, *_ in found], fontsize=8)
    ticks = [15, 20, 30, 40, 50, 80, 100, 200, 500]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(drawn, file)
