"""API keys: who is calling, from the query, X-API-Key, Authorization or a ticket, and what that key may do."""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import unquote_to_bytes

import structlog
from starlette.requests import HTTPConnection

from yaptext.errors import AuthenticationFailed, RateLimited, SettingsError, WireError
from yaptext.server.access import keyfile
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
"""Lists of tools that nobody brought before: checking one costs milliseconds, compiling it more."""


class Closable(Protocol):
    """What is ended if its key is removed: a socket."""

    def end(self, error: WireError) -> None: ...


class Account:
    """One key as the service knows it: its sockets, and what it did in the last minute."""

    def __init__(self, key: Key, clock: Clock = time.monotonic) -> None:
        self.name, self.hash, self._clock = key.name, key.hash, clock
        self._max_connections = 0
        self.connections: set[Closable] = set()
        self._buckets: dict[str, Bucket] = {}
        self.limit(key.limits)

    def limit(self, limits: Limits) -> None:
        """Sets the limits; what is not changed goes on counting."""
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

    @contextmanager
    def slot(self, connection: Closable) -> Iterator[None]:
        """Counts the connection. Raises `RateLimited` where the key has as many as it may."""
        active, limit = len(self.connections), self._max_connections
        if limit and active >= limit:
            message = f"the key {self.name} has {active} connections; limit is {limit}"
            raise RateLimited(message, retry_after_ms=_RETRY_AFTER_MS)
        self.connections.add(connection)
        try:
            yield
        finally:
            self.connections.discard(connection)


class Keys:
    """The key of `YAP_TEXT_API_KEY`, which is the operator's own and has no limits, and those of a key file.

    A key is found by its hash. How long that takes depends on the hash of what was given, which nobody can steer
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
            hint = "nobody can connect: write a key into the key file and reload, or set YAP_TEXT_API_KEY"
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
        address = connection.client.host if connection.client else ""
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

    @asynccontextmanager
    async def reloading(
        self, *, on_hangup: bool = True, reload: Callable[[], Awaitable[object]] | None = None
    ) -> AsyncIterator[None]:
        """While the block runs, SIGHUP reads the file again, also one that came before and was held back; or calls
        `reload`, which does that and more."""
        if not on_hangup:
            yield
            return
        loop, wanted = asyncio.get_running_loop(), asyncio.Event()
        # Not the loop's own way: it lets go of a signal by its default, and one that comes just then ends the process.
        before = signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(wanted.set))
        held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        task = asyncio.create_task(_reload_when(wanted, reload or self.reload))
        try:
            yield
        finally:
            # One that was held back no longer is: threads that were born since do not.
            signal.signal(signal.SIGHUP, signal.SIG_IGN if signal.SIGHUP in held_back else before)
            task.cancel()
            await asyncio.wait([task])

    async def reload(self) -> str | None:
        """Takes the file as it is now; sockets of keys that are gone are told and closed. A file that is not as it
        should be changes nothing; then returns why."""
        if self._file is None:
            return None
        try:
            keys, removed = await asyncio.to_thread(self._read_again)
        except SettingsError as error:
            _log.error("keys.refused", error=str(error))
            return str(error)
        self._keys, before, self._accounts = keys, self._accounts, {}
        for account in before.values():
            key = keys.get(account.hash)
            if key is not None and key.name == account.name:
                account.limit(key.limits)
                self._accounts[key.hash] = account
                continue
            for connection in account.connections:
                connection.end(AuthenticationFailed("The key of this connection was removed."))
        _log.info("keys.loaded", keys=len(keys), removed=removed)
        return None

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


async def _reload_when(wanted: asyncio.Event, reload: Callable[[], Awaitable[object]]) -> None:
    while True:
        await wanted.wait()
        wanted.clear()
        await reload()


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
