"""Opening several engines: in turn, or at once."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, Protocol, TypeVar

from yaptext.engine.base import Role


class Closable(Protocol):
    def close(self) -> None: ...


E = TypeVar("E", bound=Closable)
Openers = Mapping[Role, Callable[[], E | None]]
"""Each blocks until its engine is open; None if the service starts without that one."""


def in_turn(openers: Openers[E]) -> dict[Role, E]:
    """One after the other. Where one raises, those before it are closed."""
    opened: dict[Role, E] = {}
    try:
        for role, opener in openers.items():
            if (engine := opener()) is not None:
                opened[role] = engine
    except BaseException:
        for engine in opened.values():
            engine.close()
        raise
    return opened


def at_once(openers: Openers[E]) -> dict[Role, E]:
    """All at once, each in a thread. Where one raises, or a signal ends the wait, what is open is closed and the
    processes of the others are killed, which ends their threads."""
    if len(openers) == 1:
        return in_turn(openers)
    earlier = _children()
    futures: dict[Role, Future[E | None]] = {}
    try:
        for role, opener in openers.items():
            futures[role] = _begin(opener)
            # Until its process has started an engine changes the environment, which all share.
            while not futures[role].done() and len(_children() - earlier) < len(futures):
                time.sleep(0.02)
        for future in wait(futures.values(), return_when=FIRST_EXCEPTION).done:
            future.result()
        return {role: engine for role, future in futures.items() if (engine := future.result()) is not None}
    except BaseException:
        while not all(future.done() for future in futures.values()):
            for process in _children() - earlier:
                process.kill()
            wait(futures.values(), timeout=0.1)
        for future in futures.values():
            if future.exception() is None and (engine := future.result()) is not None:
                engine.close()
        raise


def _children() -> set[Any]:
    return set(multiprocessing.active_children())


def _begin(opener: Callable[[], E | None]) -> Future[E | None]:
    """A bare thread: of an executor's, a process that it forks would not know at its end that they are not its own."""
    future: Future[E | None] = Future()

    def run() -> None:
        try:
            future.set_result(opener())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
