"""engine/vllm/launch.py: engines that open at once, and what is left of them where one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess

import pytest

from yaptext.engine.vllm import launch
from yaptext.errors import StartError

SPAWN = multiprocessing.get_context("spawn")


class Fake:
    """An engine whose process sleeps until it is told that it is open, or is killed."""

    def __init__(self) -> None:
        self.opened, self.began, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.closed = False
        self.process: BaseProcess | None = None

    def open(self) -> Fake:
        self.process = SPAWN.Process(target=time.sleep, args=(300,))
        self.process.start()
        self.began.set()
        while not self.opened.wait(0.01):
            if not self.process.is_alive():
                raise StartError("its process died")
        self.ended.set()
        return self

    def close(self) -> None:
        self.closed = True
        assert self.process is not None
        self.process.kill()


def test_at_once_means_at_once() -> None:
    """The second begins while the first is still opening, but not before that has its process."""
    first, second = Fake(), Fake()

    def open_second() -> Fake:
        assert first.process is not None and first.process.pid and not first.opened.is_set()
        first.opened.set()
        second.opened.set()
        return second.open()

    try:
        assert launch.at_once({"tool": first.open, "chat": open_second}) == {"tool": first, "chat": second}
        assert not first.closed and not second.closed
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize("open_first", [False, True])
def test_a_failure_ends_the_others(open_first: bool) -> None:
    """Its own reason is told; an engine that is still opening loses its process, an open one is closed, and processes
    that are none of them live on."""
    bystander, first = Fake(), Fake()
    bystander.opened.set()
    bystander.open()

    def fail() -> Fake:
        if open_first:
            first.opened.set()
            assert first.ended.wait(60)
        raise StartError("no memory")

    try:
        with pytest.raises(StartError, match="no memory"):
            launch.at_once({"tool": first.open, "chat": fail})
        assert first.process is not None and bystander.process is not None
        first.process.join(60)
        assert not first.process.is_alive() and first.closed is open_first
        assert bystander.process.is_alive()
    finally:
        bystander.close()


def test_a_signal_ends_the_wait() -> None:
    """As a service does that is stopped while it starts; nothing of either engine is left."""
    first, second = Fake(), Fake()

    def leave(*_: object) -> None:
        raise SystemExit(143)

    def stop() -> None:
        assert second.began.wait(60)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, leave)
    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        with pytest.raises(SystemExit):
            launch.at_once({"tool": first.open, "chat": second.open})
        for fake in (first, second):
            assert fake.process is not None
            fake.process.join(60)
            assert not fake.process.is_alive()
    finally:
        stopping.join()
        signal.signal(signal.SIGUSR1, before)


def test_one_that_is_none_is_left_out() -> None:
    """At once as in turn."""
    for way in (launch.at_once, launch.in_turn):
        fake = Fake()
        fake.opened.set()
        assert way({"tool": lambda: None, "chat": fake.open}) == {"chat": fake}
        fake.close()


def test_in_turn_closes_what_was_open() -> None:
    """Where a later one fails."""
    first = Fake()
    first.opened.set()

    def fail() -> Fake:
        raise StartError("no memory")

    with pytest.raises(StartError, match="no memory"):
        launch.in_turn({"tool": first.open, "chat": fail})
    assert first.closed
