"""Bars for the hub client that draw nothing: they count bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar


def bars(tell: Callable[[int], None]) -> type:
    """A class for the client to use instead of tqdm: it draws nothing, and reports how many bytes have come.

    The client keeps two bars of bytes, one of those that came and one of those on disk; what is ahead counts.
    """
    lock = threading.Lock()
    most = 0

    class Bar:
        format_dict: ClassVar[dict[str, Any]] = {}

        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, unit: str = "", **__: Any) -> None:
            self.total, self.n, self._of_bytes = total, initial, unit == "B"

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None  # refresh, close, set_description and their like

        def update(self, n: int | None = 1) -> None:
            nonlocal most
            with lock:
                self.n += n or 0
                if self._of_bytes and self.n > most:
                    most = self.n
                    tell(most)

    return Bar
