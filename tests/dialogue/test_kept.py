"""dialogue/kept.py: responses that are continued by their id."""

from __future__ import annotations

from yaptext.dialogue.kept import Kept, KeptResponses

NONE: frozenset[str] = frozenset()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_over_its_bound_loses_its_least_used_and_no_other_keys() -> None:
    kept = KeptResponses(most_bytes=10_000)
    kept.keep("other", "0", Kept(NONE, (), 3_000))
    for number in range(3):
        kept.keep("key", str(number), Kept(NONE, (), 3_000))
        kept.find("key", "0")
    found = [kept.find("key", str(number)) is not None for number in range(3)]
    assert found == [True, False, True] and kept.find("other", "0") and not kept.find("key", "other")
    kept.keep("key", "huge", Kept(NONE, (), 10_000))
    assert kept.find("key", "huge") is None and kept.find("key", "0"), "it pushes nothing out"


def test_over_the_bound_of_all_the_key_that_has_most_loses() -> None:
    kept = KeptResponses(10_000, 12_000)
    for number in range(3):
        kept.keep("rich", str(number), Kept(NONE, (), 2_000))
    kept.keep("poor", "0", Kept(NONE, (), 3_000))
    assert [kept.find("rich", str(number)) is not None for number in range(3)] == [False, True, True]
    assert kept.find("poor", "0")


def test_each_is_kept_for_an_hour_and_then_takes_no_memory() -> None:
    clock = Clock()
    kept = KeptResponses(clock=clock)
    kept.keep("a", "0", Kept(frozenset("s"), (), 1))
    clock.now = 3599
    assert kept.find("a", "0")
    clock.now = 3601
    assert kept.find("a", "0") is None
    kept.keep("b", "0", Kept(frozenset("s"), (), 1))
    assert kept.keys == ["b"]


def test_a_session_is_forgotten_with_its_responses() -> None:
    kept = KeptResponses()
    for number, session_id in enumerate(("s", "t", "s")):
        kept.keep("a", str(number), Kept(frozenset(session_id), (), 1))
    assert kept.forget("a", "s") and not kept.forget("a", "s") and not kept.forget("b", "t")
    assert [kept.find("a", str(number)) is not None for number in range(3)] == [False, True, False]


def test_forget_drops_what_comes_from_a_session_wherever_it_is() -> None:
    """Also a response that was continued under another name, and what one socket alone knows."""
    kept = KeptResponses()
    of_socket = kept.beside(100_000)
    for number, names in enumerate(("s", "st", "t")):
        kept.keep("a", str(number), Kept(frozenset(names), (), 1))
    of_socket.keep("a", "3", Kept(frozenset("s"), (), 1))
    assert kept.forget("a", "s")
    assert [kept.find("a", str(number)) is not None for number in range(3)] == [False, False, True]
    assert of_socket.find("a", "3") is None
