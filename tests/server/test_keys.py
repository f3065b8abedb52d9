"""server/keys.py: where a key may stand, and that no attempt is anything but right or refused."""

from __future__ import annotations

import os
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from yaptext.errors import AuthenticationFailed
from yaptext.keyfile import OWN_NAME
from yaptext.server.keys import Keys

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
