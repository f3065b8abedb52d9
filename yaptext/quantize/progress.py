"""How far a job is: a bar for who watches a terminal, a line a layer for the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from yaptext.observe.notify import notify
from yaptext.quantize.awq import Layer

_log = structlog.get_logger(__name__)


class Progress:
    """Tells of one model's layers. `terminal` says that a person watches standard error."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    @contextmanager
    def layers(self, model: str) -> Iterator[Callable[[Layer], None]]:
        """What to call after each layer, as long as the block runs."""
        seconds: list[float] = []

        def left_s(layer: Layer) -> int:
            seconds.append(layer.seconds)
            recent = seconds[-8:]
            return round((layer.count - layer.number) * sum(recent) / len(recent))

        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers,")
            ends = TimeElapsedColumn(), TextColumn("gone,"), TextColumn("{task.fields[left]} s left")
            with Bar(*columns, *ends, console=Console(stderr=True)) as bar:
                task = bar.add_task(model, total=None, left="?")
                yield lambda layer: bar.update(task, total=layer.count, completed=layer.number, left=left_s(layer))
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
