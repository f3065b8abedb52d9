"""How far a job is: a bar for a person at a terminal, lines and a status for the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from yaptext.observe.systemd import notify
from yaptext.quantize.plan import Layer

_log = structlog.get_logger(__name__)
_LINE_EVERY_S, _STATUS_EVERY_S = 30.0, 2.0
"""Of a measurement, whose blocks take from a millisecond to a minute."""


class Progress:
    """Reports one model's layers and measurements. `terminal`: a person watches standard error."""

    def __init__(self, terminal: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal, self._clock = terminal, clock

    @contextmanager
    def layers(self, model: str) -> Iterator[Callable[[Layer], None]]:
        """What to call after each layer, as long as the block runs."""
        seconds: list[float] = []

        def left_s(layer: Layer) -> int:
            seconds.append(layer.seconds)
            recent = seconds[-8:]
            return round((layer.count - layer.number) * sum(recent) / len(recent))

        if self._terminal:
            with _bar(model, "layers") as tell:
                yield lambda layer: tell(layer.number, layer.count, left_s(layer))
            return

        def line(layer: Layer) -> None:
            left = left_s(layer)
            notify(f"STATUS=Quantizing {model}: layer {layer.number} of {layer.count}, {left} s left.")
            _log.info(
                "quantize.layer",
                model=model,
                layer=layer.number,
                layers=layer.count,
                seconds=round(layer.seconds, 1),
                left_s=left,
            )

        yield line

    @contextmanager
    def measuring(self, model: str, when: str) -> Iterator[Callable[[int, int], None]]:
        """What to call before the first block and after each, with the blocks measured and their count. `when` is
        before or after: measured is the float model with its rounding, or the result."""
        begun = 0.0

        def left_s(block: int, blocks: int) -> int | None:
            nonlocal begun
            if block == 0:
                begun = self._clock()  # the model is loaded by now
                return None
            return round((self._clock() - begun) / block * (blocks - block))

        if self._terminal:
            with _bar(f"{model}, measured {when}", "blocks") as tell:
                yield lambda block, blocks: tell(block, blocks, left_s(block, blocks))
            return

        status_at, line_at = float("-inf"), self._clock()
        notify(f"STATUS=Measuring {model} {when}: loading it.")

        def line(block: int, blocks: int) -> None:
            nonlocal status_at, line_at
            now, left = self._clock(), left_s(block, blocks)
            if now - status_at >= _STATUS_EVERY_S:
                status_at = now
                far = f"block {block} of {blocks}" + ("" if left is None else f", {left} s left")
                notify(f"STATUS=Measuring {model} {when}: {far}.")
            if now - line_at >= _LINE_EVERY_S:
                line_at = now
                _log.info("quantize.measuring", model=model, when=when, block=block, blocks=blocks, left_s=left)

        yield line


@contextmanager
def _bar(label: str, of: str) -> Iterator[Callable[[int, int, int | None], None]]:
    """What to call with how many are done, how many there are, and the seconds left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(f"{of},")]
    columns += [TimeElapsedColumn(), TextColumn("gone,"), TextColumn("{task.fields[left]} s left")]
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, left="?")

        def tell(done: int, total: int, left: int | None) -> None:
            bar.update(task, total=total, completed=done, left="?" if left is None else left)

        yield tell
