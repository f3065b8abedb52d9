"""An engine whose service was killed outright: a plugin that ends it. vLLM would wait for ever for the next request,
and its memory on the card would stay taken.

vLLM finds it by its entry point (`vllm.general_plugins`) in each of its processes. Under systemd all processes of the
unit end together anyway.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

_LOOKS_EVERY_S = 1.0


def register() -> None:
    """Watches from an engine's process whether its parent lives."""
    names = [thread.name for thread in threading.enumerate()]
    if multiprocessing.current_process().name.startswith("EngineCore") and __name__ not in names:
        threading.Thread(target=_watch, args=(os.getppid(),), name=__name__, daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOKS_EVERY_S)
    os.kill(os.getpid(), signal.SIGKILL)
