"""errors.py: the tree in the docstring is the tree of the classes, and each error has its place in the protocol."""

from __future__ import annotations

import pytest

from yaptext import errors
from yaptext.errors import AuthenticationFailed, WireError, YapError, wire_codes

CLASSES = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, YapError)}
WIRE = [cls for cls in CLASSES.values() if issubclass(cls, WireError) and cls is not WireError]
CLOSE_CODES = {
    "authentication_failed": 1008,
    "server_at_capacity": 1013,
    "going_away": 1012,
    "slow_client": 4001,
    "internal": 1011,
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_tree_names_every_error(name: str) -> None:
    """Who reads the docstring knows all errors there are."""
    assert errors.__doc__ is not None
    assert name in errors.__doc__.replace("└", " ").replace("─", " ").split()


@pytest.mark.parametrize("cls", WIRE, ids=lambda cls: cls.__name__)
def test_errors_close_as_the_protocol_says(cls: type[WireError]) -> None:
    """Five errors end the socket, each with its close code; after the others it lives on."""
    assert cls.close_code == CLOSE_CODES.get(cls.code)


def test_codes_are_listed_once() -> None:
    """An error that refines another shares its code."""
    codes = wire_codes()
    assert len(codes) == len(set(codes))
    assert set(codes) == {cls.code for cls in WIRE}


def test_an_error_says_what_and_how_long_to_wait() -> None:
    """The message is the exception's text; without a hint to wait there is none."""
    error = errors.RateLimited("slower", retry_after_ms=500)
    assert (str(error), error.message, error.retry_after_ms) == ("slower", "slower", 500)
    assert errors.BadMessage("what").retry_after_ms is None


def test_authentication_has_the_words_of_the_guide() -> None:
    """Clients may compare them."""
    assert AuthenticationFailed().message == (
        "Authentication required. Provide valid API key via 'api_key' query parameter or 'X-API-Key' header."
    )
