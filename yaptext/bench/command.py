"""`yap-text bench` from its options to its exit status."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from yaptext.bench import text
from yaptext.bench.campaign import Campaign
from yaptext.bench.compare import FIGURES, beside, compare, shown
from yaptext.bench.conversation import Target
from yaptext.bench.openai import OpenAI
from yaptext.bench.options import OptionError, plan_of
from yaptext.bench.plan import Plan
from yaptext.bench.results import load, write
from yaptext.bench.screen import watcher
from yaptext.bench.service import Service


def bench(parsed: argparse.Namespace, url: str, key: str) -> int:
    """Measures, or compares two measurements. Raises `YapError` for whatever keeps it from that."""
    if parsed.compare:
        return _compare(parsed)
    plan = plan_of(parsed)
    targets = _targets(parsed, plan, url, key)
    runs = plan.runs(len(targets))
    print(f"{runs} runs of {plan.duration_s:g} s and their last turns; Ctrl-C keeps what was measured", file=sys.stderr)
    campaign = Campaign(plan, targets, watcher(sys.stderr))
    interrupted = False
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(campaign.measure())
    except KeyboardInterrupt:
        interrupted = True
    content = campaign.report()
    print(text.report(content))
    for ratios in _ratios(content, parsed.figure or FIGURES):
        print(f"\n{ratios}")
    if parsed.json:
        write(parsed.json, json.dumps(content, indent=1) + "\n")
    if parsed.html:
        from yaptext.bench.report import page  # matplotlib takes half a second, which no client's start should

        write(parsed.html, page(content))
    return 130 if interrupted else 0


def _targets(parsed: argparse.Namespace, plan: Plan, url: str, key: str) -> list[Target]:
    targets: list[Target] = [] if parsed.only_openai else [Service(url, key, plan.sampling)]
    if parsed.openai:
        try:
            file = parsed.openai_key_file
            openai_key = file.read_text(encoding="utf-8").strip() if file else None
        except OSError as error:
            raise OptionError(f"cannot read {file}: {error}") from None
        targets.append(OpenAI(parsed.openai, parsed.model, openai_key, plan.sampling))
    return targets


def _ratios(content: dict[str, Any], figures: tuple[str, ...]) -> list[str]:
    """The first target in ratio to each other."""
    target, *others = content["targets"]
    found = [(other, beside(content, target, other, figures)) for other in others]
    return [shown(ratios, other, target) for other, ratios in found if ratios]


def _compare(parsed: argparse.Namespace) -> int:
    before, after = parsed.compare
    ratios = compare(load(before), load(after), parsed.figure or FIGURES)
    print(shown(ratios, before.stem, after.stem, parsed.fail_over))
    return 1 if any(ratio.fails(parsed.fail_over) for ratio in ratios) else 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed: it halves what a frame costs the bench."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
