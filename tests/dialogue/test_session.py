"""dialogue/session.py: which sessions are remembered, for how long, and for whom."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yaptext.dialogue.persona import Persona
from yaptext.dialogue.session import Session
from yaptext.dialogue.session_record import record_of
from yaptext.dialogue.session_store import Bounds, SessionStore
from yaptext.store.base import SessionRecord

RUNNING = cast(Any, object())
"""Stands for a turn: a store only looks whether there is one."""


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_store(max_sessions: int = 3, ttl_s: float = 60) -> tuple[SessionStore, Clock]:
    clock = Clock()
    return SessionStore(Bounds(max_sessions, ttl_s), clock=clock), clock


def key(session_id: object, name: str = "k") -> tuple[str, str]:
    return (name, str(session_id))


def test_a_new_session_knows_nothing() -> None:
    """It has its id, no persona of its own, no transcript and no turn."""
    session = Session(key("a"))
    assert session.session_id == "a"
    assert (session.persona, session.transcript.messages, session.turns, session.current) == (Persona(), [], 0, None)


def test_sessions_have_seeds_of_their_own() -> None:
    """Two users with the same words need not get the same answers."""
    assert len({Session(key("a")).seed for _ in range(20)}) > 1


def test_the_same_key_is_the_same_session() -> None:
    """A session outlives what opened it; finding it does not make one."""
    store, _ = make_store()
    assert store.find(key("a")) is None
    session = store.open(key("a"))
    assert store.open(key("a")) is store.find(key("a")) is session
    assert len(store) == 1


def test_the_same_id_under_another_api_key_is_another_session() -> None:
    """Nobody reaches another key's sessions."""
    store, _ = make_store()
    one, other = store.open(key("a", "one")), store.open(key("a", "other"))
    assert one is not other
    assert store.find(key("a", "one")) is one
    assert store.find(key("a", "third")) is None


def test_the_least_recently_used_goes_first() -> None:
    """Over the bound the session is dropped that was opened longest ago, counting every use."""
    store, _ = make_store(max_sessions=3)
    for name in "abcad":
        store.open(key(name))
    assert [name for name in "abcd" if store.find(key(name))] == ["a", "c", "d"]


def test_finding_is_no_use() -> None:
    """Only a turn keeps a session young, not a look at it."""
    store, _ = make_store(max_sessions=2)
    for name in "ab":
        store.open(key(name))
    store.find(key("a"))
    store.open(key("c"))
    assert store.find(key("a")) is None


@pytest.mark.parametrize(("seconds", "known"), [(59, True), (60, True), (61, False)])
def test_an_unused_session_is_forgotten_after_its_time(seconds: float, known: bool) -> None:
    """After SESSION_TTL_S without use the session is gone, and opening it begins anew."""
    store, clock = make_store(ttl_s=60)
    session = store.open(key("a"))
    clock.now += seconds
    assert (store.find(key("a")) is session) == known
    assert (store.open(key("a")) is session) == known


def test_use_begins_the_time_anew() -> None:
    """A session that is used again and again is never forgotten."""
    store, clock = make_store(ttl_s=60)
    session = store.open(key("a"))
    for _ in range(5):
        clock.now += 59
        assert store.open(key("a")) is session


def test_expired_sessions_take_no_room() -> None:
    """Any use of the store drops all that expired, not only what was asked for."""
    store, clock = make_store(max_sessions=10)
    for name in "abc":
        store.open(key(name))
    clock.now += 61
    store.open(key("d"))
    assert len(store) == 1


def test_a_running_session_is_never_dropped() -> None:
    """Neither its age nor the bound ends a session whose turn runs; what can go in its place goes."""
    store, clock = make_store(max_sessions=2)
    session = store.open(key("a"))
    session.current = RUNNING
    clock.now += 1000
    assert store.find(key("a")) is session
    for name in "bcd":
        store.open(key(name))
    assert [name for name in "abcd" if store.find(key(name))] == ["a", "d"]
    session.current = None
    assert store.find(key("a")) is None


def test_a_session_just_opened_stays_where_all_others_run() -> None:
    """The bound gives way rather than the session of the turn that is about to begin."""
    store, _ = make_store(max_sessions=1)
    for name in "ab":
        store.open(key(name)).current = RUNNING
    session = store.open(key("c"))
    assert store.find(key("c")) is session
    assert len(store) == 3


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30), st.booleans()), max_size=40), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_the_bounds_hold_whatever_happens(steps: list[tuple[int, int, bool]], most: int) -> None:
    """At any moment: no more than the bound are idle, running ones are all there, the last one used is there."""
    store, clock = make_store(max_sessions=most, ttl_s=60)
    running: dict[int, Session] = {}
    for name, seconds, runs in steps:
        clock.now += seconds
        session = store.open(key(name))
        session.current = RUNNING if runs else None
        running.pop(name, None)
        if runs:
            running[name] = session
        assert store.find(key(name)) is session
        assert all(store.find(key(other)) is kept for other, kept in running.items())
        assert len(store) <= max(most, len(running) + 1)


# --- sessions of a file that was read late


class LateFile:
    """A session file that has sessions only after the start."""

    def __init__(self, **used_at: float) -> None:
        self.late = {key(name): (at, record_of(Session(key(name)))) for name, at in used_at.items()}

    def load(self) -> list[tuple[float, SessionRecord]]:
        return []

    def take(self, of: tuple[str, str]) -> tuple[float, SessionRecord] | None:
        return self.late.pop(of, None)

    def forget(self, of: tuple[str, str]) -> Future[None]:
        return Future()


def test_a_session_that_is_read_late_comes_back_to_its_client() -> None:
    """With its seed. It counts as the least recently used until then, and one that has expired is none."""
    clock, file = Clock(), LateFile(a=950, b=960, old=900)
    store = SessionStore(Bounds(3, 60), clock=clock, file=cast(Any, file))
    seed = file.late[key("a")][1].seed
    store.open(key("new"))
    found = store.find(key("a"))
    assert found is not None and (found.seed, found.used_at) == (seed, 950)
    assert store.find(key("old")) is None
    assert store.open(key("b")).used_at == clock.now
    store.open(key("c"))
    assert [name for name in ("a", "b", "c", "new") if store.find(key(name))] == ["b", "c", "new"]
    assert store.held.bytes == sum(each.bytes for each in store.recent(10_000))


def test_a_session_that_is_read_late_can_be_forgotten() -> None:
    """The client is told that there was one."""
    store = SessionStore(Bounds(3, 60), clock=Clock(), file=cast(Any, LateFile(a=950)))
    session, _ = store.forget(key("a"))
    assert session is not None and session.forgotten
    assert store.forget(key("a"))[0] is None and len(store) == 0


# --- one key's sessions and another's


def test_a_key_that_brings_many_sessions_loses_its_own() -> None:
    """Ten thousand sessions of one key threw out those of all others."""
    store, _ = make_store(max_sessions=10)
    others = [key(number, "other") for number in range(4)]
    for each in others:
        store.open(each)
    for number in range(1000):
        store.open(key(number, "flood"))
    assert [each for each in others if store.find(each)] == others
    assert len(store) == 10


def test_a_key_keeps_its_share_of_a_full_store() -> None:
    """Who has least may still come: the one that has most makes room."""
    store, _ = make_store(max_sessions=10)
    for number in range(10):
        store.open(key(number, "first"))
    for number in range(3):
        store.open(key(number, "late"))
    assert [store.find(key(number, "first")) is None for number in range(4)] == [True, True, True, False]
    assert all(store.find(key(number, "late")) for number in range(3))


def test_a_key_is_bounded_in_sessions_and_bytes() -> None:
    """With the store far from full."""
    store = SessionStore(Bounds(1000, 60, key_sessions=5, key_bytes=100_000), clock=Clock())
    for number in range(20):
        store.open(key(number))
    assert len(store) == 5
    for number in range(15, 20):
        session = store.open(key(number))
        session.transcript.add_turn("\U0001f642" * 3_000, "yes")
        store.keep(session)
    assert store.held.bytes <= 100_000 and store.find(key(19)) is not None
    assert len(store) < 5


def test_what_sessions_take_is_counted_to_the_end() -> None:
    """Nothing is left of those that are gone."""
    store, clock = make_store(max_sessions=3)
    for number in range(30):
        session = store.open(key(number % 7, f"k{number % 4}"))
        session.transcript.add_turn("hello " * number, "bye")
        store.keep(session)
        clock.now += 10 if number == 20 else 1
        assert store.held.bytes == sum(each.bytes for each in store.recent(10_000))
    for session in store.recent(10_000):
        store.forget(session.key)
    assert (store.held.bytes, len(store), store.by_key) == (0, 0, {})


def test_the_weight_of_a_session_is_no_less_than_what_it_takes() -> None:
    """Of characters that take four bytes each, with the ids of their tokens."""
    import tracemalloc
    from array import array

    from yaptext.dialogue.talk import Line

    text = "\U0001f642" * 10_000
    tracemalloc.start()
    session = Session(key("a"))
    for number in range(50):
        session.transcript.add_turn(f"{number} {text}"[:10_000], f"{number}: yes")
    for message in session.transcript.messages:
        message.lines.segments = Line(f"User: {message.text}", {"k": array("I", [7] * 4 * len(message.text)).tobytes()})
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken <= session.weigh() <= 4 * taken


def test_transcripts_are_nothing_to_the_garbage_collector() -> None:
    """A thousand of 375 messages were 1.9 million objects for each of its rounds, which then took 0.3 s."""
    import gc
    from array import array

    from yaptext.dialogue.talk import Line

    gc.collect()
    before = len(gc.get_objects())
    sessions = [Session(key(number)) for number in range(10)]
    for session in sessions:
        for number in range(100):
            session.transcript.add_turn(f"{number}", "yes")
        for message in session.transcript.messages:
            message.lines.segments = Line(message.text, {"k": array("I", [7]).tobytes()})
    gc.collect()
    assert len(gc.get_objects()) - before < 20 * len(sessions)


def test_a_session_that_changes_after_it_has_expired_harms_nothing() -> None:
    """A client that only pings for an hour may still say what it heard of the last reply."""
    store, clock = make_store(ttl_s=60)
    session = store.open(key("a"))
    clock.now += 61
    store.keep(session)
    assert store.find(key("a")) is None
    assert store.open(key("a")) is not session
