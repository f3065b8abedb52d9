"""API keys: which one a request gives (query, X-API-Key, Authorization, ticket), how often that may act."""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes

import structlog
from starlette.requests import HTTPConnection

from yaptext.errors import AuthenticationFailed, RateLimited, SettingsError
from yaptext.server.access import caller, keyfile
from yaptext.server.access.keyfile import NO_LIMITS, OWN_NAME, Key, Limits, hash_of
from yaptext.server.access.throttle import Bucket, Clock, Throttle
from yaptext.server.access.tickets import PER_MINUTE as TICKETS_PER_MINUTE
from yaptext.server.access.tickets import Tickets

_log = structlog.get_logger(__name__)
_MOST_TRIED = 8
"""Keys that one request may give, and as many tickets."""
_IN_QUERY = {
    "api_key": re.compile(rb"(?:^|&)api(?:_|%5[Ff])key=([^&]+)").finditer,
    "ticket": re.compile(rb"(?:^|&)ticket=([^&]+)").finditer,
}
_RETRY_AFTER_MS = 2000

Act = Literal["turns", "messages", "cancels", "tickets", "tools"]
_NEW_TOOLS_PER_MINUTE = 60
"""Lists of tools that are new to the service: checking one costs milliseconds, compiling it more."""


class Account:
    """One key as the service knows it: its limits, and what it did in the last minute."""

    def __init__(self, key: Key, clock: Clock = time.monotonic) -> None:
        self.name, self.hash, self._clock = key.name, key.hash, clock
        self._buckets: dict[str, Bucket] = {}
        self.limit(key.limits)

    def limit(self, limits: Limits) -> None:
        """Sets the limits; unchanged ones keep their counts."""
        self._max_connections = limits.connections
        rates = {
            "turns": limits.turns_per_minute,
            "messages": limits.messages_per_minute,
            "cancels": limits.cancels_per_minute,
            "tickets": TICKETS_PER_MINUTE,
            "tools": _NEW_TOOLS_PER_MINUTE,
        }
        kept = self._buckets
        self._buckets = {
            act: kept[act] if act in kept and kept[act].per_minute == rate else Bucket(rate, self._clock)
            for act, rate in rates.items()
            if rate
        }

    def spend(self, act: Act) -> None:
        """Counts one. Raises `RateLimited` where the key has none left."""
        bucket = self._buckets.get(act)
        if bucket is not None and (wait_s := bucket.take()):
            message = f"the key {self.name} is out of {act}; limit is {bucket.per_minute} a minute"
            raise RateLimited(message, retry_after_ms=_ms(wait_s))

    def admit(self, active: int) -> None:
        """Raises `RateLimited` if the key has as many connections as it may; `active` are there."""
        limit = self._max_connections
        if limit and active >= limit:
            message = f"the key {self.name} has {active} connections; limit is {limit}"
            raise RateLimited(message, retry_after_ms=_RETRY_AFTER_MS)


class Keys:
    """The key of `YAP_TEXT_API_KEY`, which is the operator's own and has no limits, and those of a key file.

    A key is found by its hash. How long that takes depends on the hash of what was given, which no client can choose
    towards that of a key without the key.
    """

    def __init__(
        self,
        own: str | None,
        file: Path | None = None,
        defaults: Limits = NO_LIMITS,
        *,
        failures_per_minute: int = 0,
        clock: Clock = time.monotonic,
    ) -> None:
        """Raises `SettingsError` where the file is not as it should be."""
        # The environment may hold any bytes.
        self._own = [] if own is None else [Key(OWN_NAME, hash_of(own.encode(errors="surrogateescape")), NO_LIMITS)]
        self._file, self._defaults, self._clock = file, defaults, clock
        self._throttle = Throttle(failures_per_minute, clock=clock)
        self._tickets = Tickets(clock)
        self._keys = self._read()
        if not self._keys:
            hint = "no client can connect: write a key into the key file and reload, or set YAP_TEXT_API_KEY"
            _log.warning("keys.none", file=str(file), hint=hint)
        self._accounts: dict[bytes, Account] = {}
        """Of the keys that were used: a file may have many that are not."""

    def identify(self, connection: HTTPConnection, *, in_query: bool = True) -> Account:
        """The caller's account. Raises `AuthenticationFailed`, and `RateLimited` where the address failed too often.

        Every key given is tried, so that a proxy's header does not hide a client's query, and each wrong one costs the
        address one of its failures: a key is compared only as long as there is one left. A ticket is used up.

        A throttled address still gets in with a ticket or a key of the file: 256 random bits are not guessed, and who
        shares the address (of a NAT, a proxy) is not locked out. The own key may be a word: it is not looked at.
        """
        headers, queries = _keys_in_headers(connection), _query(connection)
        address = caller.address(connection)
        wait_s = 0.0
        for ticket in queries["ticket"] if connection.scope["type"] == "websocket" else []:
            found = self._account(self._tickets.redeem(ticket) or b"")
            if found is not None:
                return found
            wait_s = self._throttle.wait_s(address)
            self._throttle.failed(address)
        for key in (headers + (queries["api_key"] if in_query else []))[:_MOST_TRIED]:
            wait_s = self._throttle.wait_s(address)
            account = self._account(hash_of(key))
            if account is not None and (account.name != OWN_NAME or not wait_s):
                return account
            self._throttle.failed(address)
        if wait_s:
            raise RateLimited("Too many failed attempts from this address.", retry_after_ms=_ms(wait_s))
        raise AuthenticationFailed

    def ticket(self, account: Account) -> str:
        """A ticket for one socket of the account. Raises `RateLimited`."""
        account.spend("tickets")
        return self._tickets.issue(account.hash)

    async def reload(self) -> list[Account]:
        """Takes the file as it is now; returns the accounts whose key is gone: the caller closes their sockets. Raises
        `SettingsError` for a file that is not as it should be, which changes nothing."""
        if self._file is None:
            return []
        try:
            keys, removed = await asyncio.to_thread(self._read_again)
        except SettingsError as error:
            _log.error("keys.refused", error=str(error))
            raise
        self._keys, before, self._accounts = keys, self._accounts, {}
        gone = []
        for account in before.values():
            key = keys.get(account.hash)
            if key is not None and key.name == account.name:
                account.limit(key.limits)
                self._accounts[key.hash] = account
            else:
                gone.append(account)
        _log.info("keys.loaded", keys=len(keys), removed=removed)
        return gone

    def _read(self) -> dict[bytes, Key]:
        """The keys there are now, by hash. Raises `SettingsError`."""
        listed = [] if self._file is None else keyfile.read(self._file, self._defaults)
        return {key.hash: key for key in listed + self._own}

    def _read_again(self) -> tuple[dict[bytes, Key], list[str]]:
        """Also the names whose key is gone. Of a long file this takes a while: not for the event loop."""
        keys = self._read()
        removed = [key.name for key in self._keys.values() if key.hash not in keys or keys[key.hash].name != key.name]
        return keys, removed

    def _account(self, hash: bytes) -> Account | None:
        account = self._accounts.get(hash)
        if account is None and (key := self._keys.get(hash)) is not None:
            account = self._accounts[hash] = Account(key, self._clock)
        return account


def _keys_in_headers(connection: HTTPConnection) -> list[bytes]:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    given = [connection.headers.get("x-api-key", ""), token.strip(" ") if scheme.lower() == "bearer" else ""]
    return [key.encode("latin-1") for key in given if key]


def _query(connection: HTTPConnection) -> dict[str, list[bytes]]:
    """The first few of each, as bytes. Nobody has shown a key yet: what else the query holds costs next to nothing."""
    query = connection.scope.get("query_string", b"")
    return {
        name: [unquote_to_bytes(found[1].replace(b"+", b" ")) for found in itertools.islice(parts(query), _MOST_TRIED)]
        for name, parts in _IN_QUERY.items()
    }


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)
