"""dialogue/kept.py: what clients continue, within its bounds and for its time."""

from __future__ import annotations

from yaptext.dialogue.kept import Kept, KeptResponses


def kept(size: int = 0, *sessions: str) -> Kept:
    return Kept(frozenset(sessions), (), size)


def test_a_response_is_found_by_its_key_for_its_time() -> None:
    now = 0.0
    responses = KeptResponses(ttl_s=60, clock=lambda: now)
    responses.keep("a", "r1", kept())
    assert responses.find("a", "r1") is not None and responses.find("b", "r1") is None
    now = 59.0
    assert responses.find("a", "r1") is not None
    now = 61.0
    assert responses.find("a", "r1") is None
    responses.keep("b", "r2", kept())
    assert responses.bytes < 2 * 1_100, "what nobody finds takes no memory"


def test_a_key_over_its_bound_loses_its_own() -> None:
    responses = KeptResponses(100_000)
    responses.keep("b", "first", kept(50_000))
    for number in range(10):
        responses.keep("a", str(number), kept(20_000))
    assert [number for number in range(10) if responses.find("a", str(number))] == [6, 7, 8, 9]
    assert responses.find("b", "first") is not None
    responses.keep("a", "huge", kept(200_000))
    assert responses.find("a", "huge") is None and responses.find("a", "9") is not None


def test_over_the_bound_of_all_the_key_with_most_loses() -> None:
    """However many keys there are."""
    responses = KeptResponses(100_000, in_all=250_000)
    responses.keep("small", "r", kept(10_000))
    for name in "abcdef":
        for number in range(4):
            responses.keep(name, str(number), kept(20_000))
    assert responses.bytes <= 250_000 and responses.find("small", "r") is not None
    assert all(any(responses.find(name, str(number)) for number in range(4)) for name in "abcdef")


def test_forget_drops_what_comes_from_a_session_wherever_it_is() -> None:
    """Also a response that was continued under another name, and what one socket alone knows."""
    responses = KeptResponses()
    of_socket = responses.beside(100_000)
    responses.keep("a", "r1", kept(0, "s"))
    responses.keep("a", "r2", kept(0, "s", "t"))
    responses.keep("a", "r3", kept(0, "t"))
    responses.keep("b", "r1", kept(0, "s"))
    of_socket.keep("a", "r4", kept(0, "s"))
    assert responses.forget("a", "s") and not responses.forget("a", "s")
    assert [responses.find("a", name) is not None for name in ("r1", "r2", "r3")] == [False, False, True]
    assert responses.find("b", "r1") is not None and of_socket.find("a", "r4") is None
