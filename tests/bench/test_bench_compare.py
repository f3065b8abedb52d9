"""tools/bench: two results in ratio, the table of them, the page with plots, and files that cannot be read."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from yaptext.bench import text
from yaptext.bench.compare import beside, compare, shown
from yaptext.bench.figures import pooled
from yaptext.bench.report import page
from yaptext.bench.results import ReportError, load
from yaptext.commands.main import run


def result(
    rounds: list[list[float]], target: str = "yap-text", scenario: str = "warm", sessions: int = 8, **figures: Any
) -> dict[str, Any]:
    """A result whose first tokens took so long in each round."""
    return {
        "target": target,
        "scenario": scenario,
        "sessions": sessions,
        "figures": pooled([{"ttft_ms": samples} for samples in rounds]) | figures,
        "counts": {"turns": 7, "cancelled": 2, "refusals": 1},
        "errors": {"server_at_capacity": 1},
        "seconds": [1.0] * len(rounds),
        "client_cpu": 0.2,
        "notes": ["a <note> & more"],
    }


def content(*results: dict[str, Any]) -> dict[str, Any]:
    return {
        "bench": 1,
        "version": "0.1.0",
        "begun": "2026-11-24T08:00:00+00:00",
        "targets": {each["target"]: f"ws://127.0.0.1:8000/{each['target']}" for each in results},
        "plan": {"rounds": 2, "turns": 4, "persona_tokens": 300, "history_tokens": 700, "sampling": {"max_tokens": 64}},
        "results": list(results),
    }


def test_a_ratio_has_the_spread_of_its_rounds() -> None:
    """Each round with each: they belong to different minutes."""
    (ratio,) = compare(content(result([[10.0], [20.0]])), content(result([[30.0], [40.0]])), ["ttft_ms.p50"])
    assert (ratio.before, ratio.after, ratio.value) == (15.0, 35.0, pytest.approx(35 / 15))
    assert (ratio.low, ratio.high, ratio.is_noise) == (1.5, 4.0, False)


def test_one_round_has_no_spread() -> None:
    """Then the ratio stands alone, and counts."""
    (ratio,) = compare(content(result([[10.0]])), content(result([[13.0]])), ["ttft_ms.p50"])
    assert ratio.low is None and ratio.fails(1.2) and not ratio.fails(1.4)


def test_more_is_worse_but_for_what_is_better_in_plenty() -> None:
    """Half the tokens a second are twice as bad."""
    rates = [{"tokens_per_s": {"value": value, "rounds": {"value": [value]}}} for value in (100.0, 50.0)]
    before, after = (content(result([[1.0]], **rate)) for rate in rates)
    (ratio,) = compare(before, after, ["tokens_per_s"])
    assert ratio.value == 0.5 and ratio.worse == 2.0 and ratio.fails(1.2)


def test_rounds_that_do_not_agree_are_noise() -> None:
    """Whatever the ratio of the whole is, such a figure fails nobody."""
    (ratio,) = compare(content(result([[10.0], [20.0]])), content(result([[15.0], [40.0]])), ["ttft_ms.max"])
    assert ratio.value == 2.0 and ratio.low == 0.75 and ratio.is_noise and not ratio.fails(1.2)


def test_a_round_without_the_figure_is_left_out() -> None:
    """It has nothing to say about the spread."""
    (ratio,) = compare(content(result([[10.0], [], [20.0]])), content(result([[], [30.0]])), ["ttft_ms.p50"])
    assert (ratio.low, ratio.high) == (1.5, 3.0)


def test_only_like_is_compared_with_like() -> None:
    """Same target, scenario and number of sessions; where nothing is alike, it is said."""
    one, other = content(result([[1.0]], sessions=1)), content(result([[1.0]], sessions=2))
    with pytest.raises(ReportError, match="in common"):
        compare(one, other)


def test_a_peer_is_compared_round_by_round() -> None:
    """They alternated, so the same round of both saw the same machine."""
    both = content(result([[10.0], [40.0]]), result([[20.0], [80.0]], target="openai"))
    (ratio,) = beside(both, "yap-text", "openai", ["ttft_ms.p50"])
    assert (ratio.value, ratio.low, ratio.high) == (0.5, 0.5, 0.5)


def test_the_table_shows_figures_ratio_and_spread() -> None:
    """And a word where a figure got worse, or where that is not sure."""
    ratios = compare(content(result([[10.0], [11.0]])), content(result([[30.0], [33.0]])), ["ttft_ms.p50"])
    lines = shown(ratios, "old", "new", 1.2).splitlines()
    assert lines[0].split() == ["old", "new", "ratio", "spread"]
    assert lines[1] == "warm, 8 sessions, yap-text"
    assert lines[2].split() == ["ttft_ms.p50", "10.5", "31.5", "3.00", "2.73", "to", "3.30", "WORSE"]


@pytest.mark.parametrize(("after", "status"), [([[11.0], [11.5]], 0), ([[15.0], [16.0]], 1), ([[9.0], [30.0]], 0)])
def test_the_exit_status_tells_of_what_got_worse(
    after: list[list[float]], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 over the factor, 0 under it and where the rounds do not agree."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(content(result([[10.0], [10.5]]))))
    b.write_text(json.dumps(content(result(after))))
    assert run(["bench", "--compare", str(a), str(b), "--figure", "ttft_ms.p50", "--fail-over", "1.2"]) == status
    assert "ttft_ms.p50" in capsys.readouterr().out


@pytest.mark.parametrize("written", [None, "", "[]", '{"bench": 99, "results": []}', '{"bench": 1}'])
def test_a_file_that_is_no_result_is_named(written: str | None, tmp_path: Path) -> None:
    """One line, no traceback."""
    file = tmp_path / "a.json"
    if written is not None:
        file.write_text(written)
    with pytest.raises(ReportError, match=str(file)):
        load(file)


class Reader(HTMLParser):
    """Holds that elements are closed in order, and collects what a page says and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_holds_all_figures_and_loads_nothing() -> None:
    """Well formed, self-contained, without scripts; what users could have written is escaped."""
    both = content(
        result([[10.0], [40.0]]),
        result([[20.0], [80.0]], target="openai"),
        result([[0.0]], sessions=1),
        result([[12.3]], scenario="ramp", sessions=256),
    )
    html = page(both)
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [] and reader.links == [] and "script" not in reader.tags
    assert "url(" not in html and "@import" not in html and html.count("http") == 0
    for told in ("warm, 8 sessions, openai", "ramp to 256 sockets at most", "12.3", "a <note> & more", "0.50 to 0.50"):
        assert told in reader.text
    assert reader.tags.count("svg") == 4  # first tokens, over sessions, and the curves of two scenarios
    assert "prefers-color-scheme: dark" in html


def test_the_report_of_a_terminal_tells_what_went_wrong() -> None:
    """Refusals, errors, notes, and a bench that was itself too busy, beside the figures."""
    told = text.report(content(result([[10.0]]) | {"client_cpu": 0.9}))
    assert "7 turns, 2 cancelled, 1 refused; 1 x server_at_capacity; the bench itself used 90% of a core" in told
    assert "a <note> & more" in told
    assert told.splitlines()[-1].split() == ["ttft", "1", "10", "10", "10", "10"]
