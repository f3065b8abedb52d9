"""API keys: who is calling, from the query, X-API-Key, Authorization or a ticket, and what that key may do."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qs

import structlog
from starlette.requests import HTTPConnection

from yaptext import keyfile
from yaptext.errors import AuthenticationFailed, RateLimited, SettingsError
from yaptext.keyfile import NO_LIMITS, OWN_NAME, Key, Limits, hash_of
from yaptext.server.throttle import Bucket, Clock, Throttle
from yaptext.server.tickets import PER_MINUTE as TICKETS_PER_MINUTE
from yaptext.server.tickets import Tickets

if TYPE_CHECKING:
    from yaptext.server.connection import Connection

_log = structlog.get_logger(__name__)
_MOST_TRIED = 8
"""Keys that one request may give, and as many tickets."""
_RETRY_AFTER_MS = 2000

Act = Literal["turns", "messages", "cancels", "tickets"]


class Account:
    """One key as the service knows it: its sockets, and what it did in the last minute."""

    def __init__(self, key: Key, clock: Clock = time.monotonic) -> None:
        self.name, self.hash, self._clock = key.name, key.hash, clock
        self._max_connections = 0
        self.connections: set[Connection] = set()
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
    def slot(self, connection: Connection) -> Iterator[None]:
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
        self._accounts: dict[bytes, Account] = {}
        self._take([] if file is None else keyfile.read(file, defaults))

    def identify(self, connection: HTTPConnection, *, in_query: bool = True) -> Account:
        """The caller's account. Raises `AuthenticationFailed`, and `RateLimited` where the address failed too often.

        Every key given is tried, so that a proxy's header does not hide a client's query. A ticket is used up.

        A throttled address still gets in with a ticket or a key of the file: 256 random bits are not guessed, and who
        shares the address (of a NAT, a proxy) is not locked out. The own key may be a word: it is not looked at.
        """
        headers, queries = _keys_in_headers(connection), _query(connection)
        tickets = queries.get("ticket", [])[:_MOST_TRIED] if connection.scope["type"] == "websocket" else []
        for ticket in tickets:
            found = self._accounts.get(self._tickets.redeem(ticket.encode("latin-1")) or b"")
            if found is not None:
                return found
        given = (headers + (queries.get("api_key", []) if in_query else []))[:_MOST_TRIED]
        tried = [self._accounts.get(hash_of(key.encode("latin-1", "replace"))) for key in given]
        account = next(filter(None, tried), None)
        address = connection.client.host if connection.client else ""
        wait_s = self._throttle.wait_s(address) if given or tickets else 0
        if account is not None and (account.name != OWN_NAME or not wait_s):
            return account
        if wait_s:
            raise RateLimited("Too many failed attempts from this address.", retry_after_ms=_ms(wait_s))
        for _ in given + tickets:
            self._throttle.failed(address)
        raise AuthenticationFailed

    def ticket(self, account: Account) -> str:
        """A ticket for one socket of the account. Raises `RateLimited`."""
        account.spend("tickets")
        return self._tickets.issue(account.hash)

    @asynccontextmanager
    async def reloading(
        self, *, on_hangup: bool = True, also: Callable[[], None] = lambda: None
    ) -> AsyncIterator[None]:
        """While the block runs, SIGHUP reads the file again, also one that came before and was held back; and calls
        `also`."""
        if not on_hangup:
            yield
            return
        loop, wanted = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, wanted.set)
        held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        task = asyncio.create_task(self._reload_when(wanted, also))
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            if signal.SIGHUP in held_back:  # by threads that were born since it no longer is
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            task.cancel()
            await asyncio.wait([task])

    async def _reload_when(self, wanted: asyncio.Event, also: Callable[[], None]) -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            also()
            await self.reload()

    async def reload(self) -> None:
        """Takes the file as it is now; sockets of keys that are gone are told and closed. A file that is not as it
        should be changes nothing."""
        if self._file is None:
            return
        try:
            listed = await asyncio.to_thread(keyfile.read, self._file, self._defaults)
        except SettingsError as error:
            _log.error("keys.refused", error=str(error))
            return
        gone = self._take(listed)
        for account in gone:
            for connection in account.connections:
                connection.end(AuthenticationFailed("The key of this connection was removed."))
        _log.info("keys.loaded", keys=len(self._accounts), removed=[account.name for account in gone])

    def _take(self, listed: list[Key]) -> list[Account]:
        """Makes these the keys of the file; returns the accounts that are gone."""
        before, self._accounts = self._accounts, {}
        for key in listed + self._own:
            account = before.get(key.hash)
            if account is None or account.name != key.name:
                account = Account(key, self._clock)
            else:
                account.limit(key.limits)
            self._accounts[key.hash] = account
        return [account for account in before.values() if account not in self._accounts.values()]


def _keys_in_headers(connection: HTTPConnection) -> list[str]:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    given = [connection.headers.get("x-api-key", ""), token.strip(" ") if scheme.lower() == "bearer" else ""]
    return [key for key in given if key]


def _query(connection: HTTPConnection) -> dict[str, list[str]]:
    # latin-1: the bytes of the query as they came, whatever they are
    return parse_qs(connection.scope.get("query_string", b"").decode("latin-1"), encoding="latin-1")


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)
