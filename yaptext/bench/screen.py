"""How far a bench is: two lines that are drawn again and again on a terminal, one line a run elsewhere."""

from __future__ import annotations

import shutil
import time
from collections import deque
from itertools import pairwise
from typing import TextIO

import numpy as np

from yaptext.bench.results import Place
from yaptext.bench.run import Run
from yaptext.bench.text import heading

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 24
_RECENT = 400
"""Tokens' gaps that the live median is of."""


class Lines:
    """A line for each run that is over."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._of = ""

    def begin(self, run: Run, number: int, of: int) -> None:
        self._of = f"{number}/{of}"

    def tick(self, run: Run) -> None:
        pass

    def end(self, run: Run) -> None:
        print(f"{self._of} {title(run)}: {progress(run)}", file=self._out, flush=True)


class Screen(Lines):
    """Also shows the run that is on, with the rate of its tokens over time."""

    def begin(self, run: Run, number: int, of: int) -> None:
        super().begin(run, number, of)
        self._rates: deque[float] = deque(maxlen=_WIDTH)
        self._last = (time.perf_counter(), 0)
        print("\n", file=self._out)
        self.tick(run)

    def tick(self, run: Run) -> None:
        now, tokens = time.perf_counter(), sum(len(turn.arrivals) for turn in run.turns)
        then, before = self._last
        if now - then > 0.05:
            self._rates.append((tokens - before) / (now - then))
            self._last = now, tokens
        top = max(self._rates, default=0) or 1
        graph = "".join(_BARS[round(rate / top * (len(_BARS) - 1))] for rate in self._rates)
        rate = self._rates[-1] if self._rates else 0
        self._draw(
            f"{self._of} {title(run)}, {now - run.begun_at:.0f} s  {graph:>{_WIDTH}} {rate:.0f} tokens/s",
            f"    {progress(run)}",
        )

    def end(self, run: Run) -> None:
        self._draw(f"{self._of} {title(run)}", f"    {progress(run)}")

    def _draw(self, *lines: str) -> None:
        columns = shutil.get_terminal_size().columns
        drawn = "".join(f"\033[2K{line[: columns - 1]}\n" for line in lines)
        print(f"\033[{len(lines)}A{drawn}", end="", file=self._out, flush=True)


def watcher(out: TextIO) -> Lines:
    return Screen(out) if out.isatty() else Lines(out)


def title(run: Run) -> str:
    return f"{heading(Place(run.target.name, run.scenario, run.sessions))}, round {run.number}"


def progress(run: Run) -> str:
    """The run so far, in short; cheap enough to be made five times a second."""
    ended = sum(turn.outcome != "open" for turn in run.turns)
    parts = [f"{ended} turns"]
    first = [(turn.arrivals[0] - turn.sent_at) * 1000 for turn in run.turns[-_RECENT:] if turn.arrivals]
    if first:
        parts.append(f"first token {np.median(first):.1f} ms")
    gaps = [(later - earlier) * 1000 for turn in run.turns[-8:] for earlier, later in pairwise(turn.arrivals[-50:])]
    if gaps:
        parts.append(f"between tokens {np.median(gaps):.1f} ms")
    failed = sum(turn.outcome == "failed" for turn in run.turns)
    parts += [f"{run.counts['refusals']} refused"] if run.counts["refusals"] else []
    parts += [f"{failed} failed"] if failed else []
    return ", ".join(parts)
