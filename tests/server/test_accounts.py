"""server/access/accounts.py: where a key may stand, that every attempt is right or refused, and what a key may do."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
import structlog
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from yaptext.errors import AuthenticationFailed, RateLimited, SettingsError
from yaptext.server.access import keyfile
from yaptext.server.access.accounts import Account, Keys
from yaptext.server.access.keyfile import OWN_NAME, Key, Limits

often = settings(max_examples=200, deadline=None)
WAYS = ["query", "header", "bearer"]
NON_ASCII = ["schlüssel", "voilà", "Å", "ключ", "密钥", "🔑"]


def connection(query: bytes = b"", *headers: tuple[bytes, bytes]) -> HTTPConnection:
    return HTTPConnection({"type": "websocket", "query_string": query, "headers": list(headers)})


def asking(way: str, key: bytes) -> HTTPConnection:
    """A caller that gives these bytes in one of the three ways."""
    match way:
        case "query":
            return connection(b"api_key=" + quote(key).encode())
        case "header":
            return connection(b"", (b"x-api-key", key))
        case _:
            return connection(b"", (b"authorization", b"Bearer " + key))


def passes(keys: Keys, caller: HTTPConnection) -> bool:
    try:
        return keys.identify(caller).name == OWN_NAME
    except AuthenticationFailed:
        return False


each_way = pytest.mark.parametrize("way", WAYS)


@each_way
@pytest.mark.parametrize("key", ["yap_token", "a+b/c=d&e%f", "x" * 500, *NON_ASCII])
def test_the_right_key_passes(way: str, key: str) -> None:
    """In the query, in X-API-Key or as a bearer, whatever letters it is written in."""
    assert passes(Keys(key), asking(way, key.encode()))


@each_way
@pytest.mark.parametrize("key", ["yap_token", "schlüssel"])
@pytest.mark.parametrize("wrong", ["", "wrong", "YAP_TOKEN", "yap_token2", "yap_toke", "schlussel", "schlüsse", "ключ"])
def test_a_wrong_key_fails(way: str, key: str, wrong: str) -> None:
    """Neither a part, nor another case, nor the same letters without their dots."""
    with pytest.raises(AuthenticationFailed):
        Keys(key).identify(asking(way, wrong.encode()))


@pytest.mark.parametrize(
    "caller",
    [
        connection(),
        connection(b"api_key="),
        connection(b"api_key"),
        connection(b"key=yap_token"),
        connection(b"API_KEY=yap_token"),
        connection(b"%"),
        connection(b"api_key=%zz&&&=;"),
        connection(b"", (b"authorization", b"yap_token")),
        connection(b"", (b"authorization", b"Basic yap_token")),
        connection(b"", (b"authorization", b"Bearer")),
        connection(b"", (b"authorization", b"Bearer ")),
        connection(b"", (b"x-api-key", b"")),
        connection(b"", (b"cookie", b"api_key=yap_token")),
        HTTPConnection({"type": "http", "headers": []}),
    ],
)
def test_no_key_fails(caller: HTTPConnection) -> None:
    """A caller without a key is told that one is needed."""
    with pytest.raises(AuthenticationFailed, match="Authentication required"):
        Keys("yap_token").identify(caller)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
@pytest.mark.parametrize("space", [" ", "  "])
def test_the_bearer_scheme_has_no_case(scheme: str, space: str) -> None:
    """As HTTP has it; spaces around the token do not count."""
    assert passes(Keys("k"), connection(b"", (b"authorization", f"{scheme}{space}k".encode())))


def test_any_of_several_keys_may_be_the_right_one() -> None:
    """A proxy's header does not hide a client's query, and a query may have the name twice."""
    keys = Keys("right")
    wrong, bearer = (b"x-api-key", b"wrong"), (b"authorization", b"Bearer wrong")
    assert passes(keys, connection(b"api_key=right", wrong, bearer))
    assert passes(keys, connection(b"api_key=wrong", wrong, (b"authorization", b"Bearer right")))
    assert passes(keys, connection(b"api_key=wrong", (b"x-api-key", b"right"), bearer))
    assert passes(keys, connection(b"api_key=wrong&api_key=right"))
    assert not passes(keys, connection(b"api_key=wrong", wrong, bearer))


def test_a_plus_in_a_query_is_a_space() -> None:
    """As forms write it; a plus of the key itself comes percent-encoded."""
    keys = Keys("a b+c")
    assert passes(keys, connection(f"api_key={quote_plus('a b+c')}".encode()))
    assert not passes(keys, connection(b"api_key=a b+c"))


def test_a_query_may_hold_raw_bytes() -> None:
    """A client that does not percent-encode is understood too."""
    assert passes(Keys("schlüssel"), connection("api_key=schlüssel".encode()))


@each_way
def test_a_key_of_the_environment_need_not_be_utf8(way: str) -> None:
    """Bytes that are no UTF-8 reach settings as Python hands them over, and are the same bytes here."""
    assert passes(Keys(os.fsdecode(b"k\xff")), asking(way, b"k\xff"))


@given(key=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
@example("voilà")
@often
@each_way
def test_any_key_passes_in_any_way(way: str, key: str) -> None:
    """What an operator may choose as key, a client can give."""
    assume(key == key.strip(" "))  # a header has no room for spaces at its ends
    assert passes(Keys(key), asking(way, key.encode()))


@given(
    key=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    query=st.binary(),
    headers=st.lists(
        st.tuples(st.sampled_from([b"x-api-key", b"authorization", b"host"]), st.binary() | st.just(b"Bearer \xff")),
        max_size=3,
    ),
)
@often
def test_any_attempt_is_right_or_refused(key: str, query: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """No bytes of a caller make anything else happen."""
    assert passes(Keys(key), connection(b"api_key=" + query, *headers)) in (True, False)


# --- the key file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def header(key: str, address: str = "192.0.2.1") -> HTTPConnection:
    scope = {"type": "http", "headers": [(b"x-api-key", key.encode())], "client": (address, 1)}
    return HTTPConnection(scope)


def refusal(keys: Keys, caller: HTTPConnection) -> type[Exception] | None:
    try:
        keys.identify(caller)
    except (AuthenticationFailed, RateLimited) as error:
        return type(error)
    return None


@each_way
def test_a_named_key_is_its_name(way: str, file: Path) -> None:
    """Each of several, beside the own one, in each way."""
    (a, _), (b, _) = keyfile.add("a", file), keyfile.add("b", file)
    keys = Keys("own", file)
    assert [keys.identify(asking(way, key.encode())).name for key in (a, b, "own")] == ["a", "b", OWN_NAME]
    for wrong in (a[:-1], a + "x", a.upper(), file.read_text().split()[1], file.read_text().split(":")[1][:64]):
        assert refusal(keys, asking(way, wrong.encode())) is AuthenticationFailed


def test_only_so_many_keys_of_a_request_are_tried() -> None:
    """And each of them counts as a guess."""
    assert passes(Keys("k"), connection(b"api_key=wrong&" * 7 + b"api_key=k"))
    assert not passes(Keys("k"), connection(b"api_key=wrong&" * 8 + b"api_key=k"))
    keys = Keys("k", failures_per_minute=9)
    found = [refusal(keys, connection(query)) for query in (b"api_key=wrong&" * 8, b"ticket=wrong", b"api_key=wrong")]
    assert found == [AuthenticationFailed, AuthenticationFailed, RateLimited]


def test_each_key_of_a_request_costs_a_guess_before_it_is_compared() -> None:
    """With three guesses left only three keys are compared, wherever in the request the right one is; and each of the
    wrong ones that came before it stays counted."""
    wrong = b"api_key=wrong&"
    keys = Keys("k", failures_per_minute=3, clock=lambda: 0.0)
    assert refusal(keys, connection(wrong * 3 + b"api_key=k")) is RateLimited
    keys = Keys("k", failures_per_minute=3, clock=lambda: 0.0)
    assert refusal(keys, connection(wrong * 2 + b"api_key=k")) is None
    assert refusal(keys, connection(wrong)) is AuthenticationFailed
    assert refusal(keys, connection(b"api_key=k")) is RateLimited
    keys = Keys("k", failures_per_minute=10, clock=lambda: 0.0)
    for query, found in ((wrong * 8, AuthenticationFailed), (wrong * 2 + b"api_key=k", RateLimited)):
        assert refusal(keys, connection(query)) is found


def test_a_throttled_request_still_gets_in_by_a_key_of_the_file(file: Path) -> None:
    """Behind any number of wrong ones."""
    key, _ = keyfile.add("a", file)
    keys = Keys("own", file, failures_per_minute=1, clock=lambda: 0.0)
    for _ in range(5):
        assert keys.identify(connection(b"api_key=wrong&" * 7 + f"api_key={key}".encode())).name == "a"
    assert refusal(keys, connection(b"api_key=own")) is RateLimited


def test_the_rest_of_a_query_is_not_taken_apart() -> None:
    """Only the two names, also in the middle and percent-encoded as logs know them; others that end so do not count."""
    keys = Keys("a+b")
    for query in (b"x=1&api_key=a%2bb&y", b"api%5Fkey=a%2Bb", b"&&api_key=&api_key=a%2Bb"):
        assert passes(keys, connection(query)), query
    for query in (b"xapi_key=a%2Bb", b"x=api_key=a%2Bb", b"api_key%3Da%2Bb"):
        assert not passes(keys, connection(query)), query


def test_a_key_in_the_address_does_not_count_where_headers_are_asked_for() -> None:
    """As for a ticket."""
    keys = Keys("k")
    assert keys.identify(header("k"), in_query=False).name == OWN_NAME
    with pytest.raises(AuthenticationFailed):
        keys.identify(connection(b"api_key=k"), in_query=False)


def test_a_reload_takes_the_file_as_it_is(file: Path) -> None:
    """New keys count, removed ones do not, and one that stays keeps its account, limits anew."""
    (a, line), (b, _) = keyfile.add("a", file), keyfile.add("b", file)
    keys = Keys(None, file, Limits(turns_per_minute=1))
    account = keys.identify(header(a))
    account.spend("turns")
    file.write_text(f"{line} messages_per_minute=2\n")
    c, _ = keyfile.add("c", file)
    gone = keys.identify(header(b))
    assert asyncio.run(keys.reload()) == [gone], "what the caller has to close"
    assert keys.identify(header(a)) is account and keys.identify(header(c)).name == "c"
    assert refusal(keys, header(b)) is AuthenticationFailed
    with pytest.raises(RateLimited):
        account.spend("turns")
    account.spend("messages")
    account.spend("messages")
    with pytest.raises(RateLimited, match="the key a is out of messages; limit is 2 a minute"):
        account.spend("messages")


def test_a_reload_costs_as_much_as_there_are_keys(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account is held against every other, and the event loop makes none of a key that nobody has used."""
    lines = [f"name-{number} sha256:{number:064x}" for number in range(400)]
    file.write_text("\n".join(lines))
    keys = Keys("own", file)
    compared, threads = [0], set()

    class Counted(Account):
        def __init__(self, *given: Any) -> None:
            threads.add(threading.current_thread())
            super().__init__(*given)

        def __eq__(self, other: object) -> bool:
            compared[0] += 1
            return self is other

        __hash__ = Account.__hash__

    monkeypatch.setattr("yaptext.server.access.accounts.Account", Counted)
    file.write_text("\n".join([f"new-{line}" for line in lines]))
    with structlog.testing.capture_logs() as told:
        asyncio.run(keys.reload())
    assert len(told[-1]["removed"]) == 400 and told[-1]["keys"] == 401
    assert compared[0] < 4000 and threading.main_thread() not in threads


@pytest.mark.parametrize("damage", ["secret\n", None])
def test_a_broken_file_is_refused_as_a_whole(file: Path, damage: str | None) -> None:
    """One line says so and shows nothing of it; the keys that were there stay, and no new one of it counts."""
    a, line = keyfile.add("a", file)
    keys = Keys(None, file)
    b, _ = keyfile.add("b", file)
    if damage is None:
        file.unlink()
    else:
        file.write_text(file.read_text() + damage)
    with structlog.testing.capture_logs() as lines, pytest.raises(SettingsError) as refused:
        asyncio.run(keys.reload())
    (told,) = lines
    assert told["error"] == str(refused.value)
    assert (told["event"], told["log_level"]) == ("keys.refused", "error") and str(file) in told["error"]
    assert "secret" not in told["error"] and line.split(":")[1] not in told["error"]
    assert keys.identify(header(a)).name == "a" and refusal(keys, header(b)) is AuthenticationFailed


def test_a_broken_file_ends_a_start(file: Path) -> None:
    """Before the engines open."""
    file.write_text("broken\n")
    with pytest.raises(SettingsError, match="line 1"):
        Keys("own", file)


# --- limits


@pytest.mark.parametrize("act", ["turns", "messages", "cancels"])
def test_a_key_has_so_many_a_minute(act: str) -> None:
    """Of each kind apart; over it the wait is told, and 0 is no limit."""
    limits = Limits(**{f"{act}_per_minute": 3})
    account = Account(Key("a", b"", limits), clock=lambda: 0.0)
    for _ in range(3):
        account.spend(act)  # type: ignore[arg-type]
    with pytest.raises(RateLimited, match=f"the key a is out of {act}; limit is 3 a minute") as caught:
        account.spend(act)  # type: ignore[arg-type]
    assert caught.value.retry_after_ms == 20_000
    for other in {"turns", "messages", "cancels"} - {act}:
        for _ in range(1000):
            account.spend(other)  # type: ignore[arg-type]


# --- guessing


def test_who_guesses_has_to_wait(file: Path) -> None:
    """From one address: then no guess is looked at, not even a right one of the own key, until the wait is over.
    Named keys get in from there, and others from elsewhere."""
    now = [0.0]
    named, _ = keyfile.add("a", file)
    keys = Keys("own", file, failures_per_minute=3, clock=lambda: now[0])
    assert [refusal(keys, header("wrong")) for _ in range(5)] == [AuthenticationFailed] * 3 + [RateLimited] * 2
    assert refusal(keys, header("own")) is RateLimited
    assert refusal(keys, header(named)) is None and refusal(keys, header("own", "192.0.2.2")) is None
    with pytest.raises(RateLimited) as caught:
        keys.identify(header("own"))
    assert caught.value.retry_after_ms == 20_000
    now[0] += 20
    assert refusal(keys, header("own")) is None
    assert [refusal(keys, header("wrong")) for _ in range(2)] == [AuthenticationFailed, RateLimited]


def test_neither_right_keys_nor_none_are_guesses() -> None:
    """Who asks without a key learns that one is needed, as often as wanted."""
    keys = Keys("own", failures_per_minute=1)
    for _ in range(50):
        assert refusal(keys, header("")) is AuthenticationFailed and refusal(keys, header("own")) is None


def test_forged_tickets_are_guesses_and_real_ones_are_not() -> None:
    """A real one gets in from a throttled address, too, though of the own key."""
    keys = Keys("own", failures_per_minute=2)
    ticket = keys.ticket(keys.identify(header("own")))

    def by_ticket(ticket: str) -> HTTPConnection:
        return connection(f"ticket={ticket}".encode())

    found = [refusal(keys, by_ticket("forged")) for _ in range(3)]
    assert found == [AuthenticationFailed, AuthenticationFailed, RateLimited]
    assert refusal(keys, by_ticket(ticket)) is None
    assert refusal(keys, by_ticket(ticket)) is RateLimited


def test_a_ticket_opens_a_websocket_for_its_key_and_nothing_else(file: Path) -> None:
    """Not an HTTP route; and not after its key was removed."""
    key, _ = keyfile.add("a", file)
    keys = Keys("own", file)
    account = keys.identify(header(key))
    first, second = keys.ticket(account), keys.ticket(account)
    scope = {"type": "http", "query_string": f"ticket={first}".encode(), "headers": []}
    assert refusal(keys, HTTPConnection(scope)) is AuthenticationFailed
    assert keys.identify(connection(f"ticket={first}".encode())) is account
    file.write_text("")
    asyncio.run(keys.reload())
    assert refusal(keys, connection(f"ticket={second}".encode())) is AuthenticationFailed


def test_the_time_tells_nothing_of_a_key() -> None:
    """10,000 wrong keys that share all but the last byte with the right one take as long as 10,000 that share none.

    Taken in turns and compared by their lower quartiles: whatever else the machine does meets both alike, and a round
    that it spoils is not the last. At this length an early exit (`==` on the keys themselves) is a difference of 10 %;
    as it is there are 0.3 %.
    """
    key = b"k" * 65_536
    keys = Keys(key.decode())
    callers = {
        "near": connection(b"", (b"x-api-key", key[:-1] + b"x")),
        "far": connection(b"", (b"x-api-key", b"x" + key[1:])),
    }

    def difference() -> float:
        took: dict[str, list[int]] = {name: [] for name in callers}
        for number in range(10_000):
            for name in sorted(callers, reverse=number % 2 == 0):
                begun = time.perf_counter_ns()
                refusal(keys, callers[name])
                took[name].append(time.perf_counter_ns() - begun)
        near, far = (statistics.quantiles(times, n=4)[0] for times in took.values())
        return abs(near - far) / max(near, far)

    gc.disable()
    try:
        assert any(difference() < 0.05 for _ in range(5))
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("own", "content", "told"), [(None, "# none yet\n", 1), ("own", "# none yet\n", 0), ("own", None, 0)]
)
def test_a_service_that_no_key_opens_warns(tmp_path: Path, own: str | None, content: str | None, told: int) -> None:
    """Beside a key file the default key does not count."""
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with structlog.testing.capture_logs() as lines:
        Keys(own, tmp_path / "keys" if content is not None else None)
    assert [line["event"] for line in lines] == ["keys.none"] * told
