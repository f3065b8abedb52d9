"""One run: one scenario, at one number of sessions, against one target, once; and what it noted."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from yaptext.bench.conversation import Conversation, Full, Target
from yaptext.bench.figures import Samples, samples_of
from yaptext.bench.plan import Plan
from yaptext.bench.prompts import Prompts
from yaptext.bench.turn import Turn
from yaptext.client.errors import Refused

_MAX_RETRIES = 5
_MAX_WAIT_S = 10.0
"""A refusal may ask for more than this; a bench does not wait for it."""
_FREED_LIMIT_S = 10.0
_LAG_EVERY_S = 0.02


@dataclass(slots=True)
class Guest:
    """One user of a run and the conversation they hold."""

    user: int
    conversation: Conversation
    random: random.Random = field(repr=False)


class Run:
    def __init__(self, plan: Plan, target: Target, scenario: str, sessions: int, number: int, nonce: str) -> None:
        self.plan, self.target, self.scenario, self.sessions, self.number = plan, target, scenario, sessions, number
        self._name = f"{nonce}-{scenario}-{sessions}-{number}"
        self.prompts = Prompts(
            plan.seed,
            self._name,
            persona_tokens=plan.persona_tokens,
            history_tokens=plan.history_tokens,
            shared_persona=plan.shared_persona,
        )
        self.turns: list[Turn] = []
        self.noted: defaultdict[str, list[float]] = defaultdict(list)
        """Samples that are not of a turn, by figure."""
        self.errors: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.begun_at = time.perf_counter()
        self.seconds = self.client_cpu = 0.0

    @asynccontextmanager
    async def clock(self) -> AsyncIterator[None]:
        """Times the run, and how late the bench's own loop is meanwhile."""
        self.begun_at, cpu = time.perf_counter(), time.process_time()
        lag = asyncio.create_task(self._note_lag())
        try:
            async with asyncio.timeout(self.plan.run_limit_s):
                yield
        except TimeoutError:
            self.notes.append(f"cut after {self.plan.run_limit_s:.0f} s")
            self.errors["run_timeout"] += 1
        finally:
            lag.cancel()
            await asyncio.wait([lag])
            self.seconds = time.perf_counter() - self.begun_at
            self.client_cpu = (time.process_time() - cpu) / self.seconds

    async def _note_lag(self) -> None:
        while True:
            due = time.perf_counter() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self.noted["client_lag_ms"].append(max(0.0, time.perf_counter() - due) * 1000)

    def samples(self) -> Samples:
        return samples_of(self.turns) | {name: values for name, values in self.noted.items() if values}

    # --- the users

    def guest(self, user: int) -> Guest:
        chosen = random.Random(f"{self.plan.seed}/{self.scenario}/{user}")
        return Guest(user, self.target.conversation(), chosen)

    @asynccontextmanager
    async def crowd(self, more: int = 0) -> AsyncIterator[list[Guest]]:
        """All users of this run (and `more`) who were given a place. At the end they leave."""
        guests = [self.guest(user) for user in range(self.sessions + more)]
        admitted: list[Guest] = []

        async def enter(guest: Guest) -> None:
            await self.connect(guest)
            admitted.append(guest)

        try:
            await self.each(guests, enter)
            self.counts["admitted"] += len(admitted)
            yield sorted(admitted, key=lambda guest: guest.user)
        finally:
            await self.leave(guests)

    async def leave(self, guests: Sequence[Guest]) -> None:
        self.counts["strays"] += sum(guest.conversation.strays for guest in guests)
        await asyncio.gather(*(guest.conversation.close() for guest in guests))

    async def each(self, guests: Sequence[Guest], act: Callable[[Guest], Awaitable[None]]) -> None:
        """Every guest does it, at once or spread over the plan's time. Who is refused or loses the connection stops,
        and the others go on."""

        async def one(guest: Guest) -> None:
            await asyncio.sleep(guest.random.uniform(0, self.plan.spread_s))
            try:
                await act(guest)
            except Full as refusal:
                self.note_refusal(refusal)
            except Refused:
                self.errors["disconnected"] += 1

        async with asyncio.TaskGroup() as group:
            for guest in guests:
                group.create_task(one(guest))

    async def connect(self, guest: Guest, *, tries: int = 1) -> None:
        """Raises `Full` where the last of the tries is refused, too, each after the wait that was asked for."""
        for left in reversed(range(tries)):
            begun = time.perf_counter()
            try:
                await guest.conversation.open()
            except Full as refusal:
                if not left:
                    raise
                self.note_refusal(refusal)
                await asyncio.sleep(min((refusal.retry_after_ms or 100) / 1000, _MAX_WAIT_S))
            else:
                self.note("connect_ms", begun)
                return

    async def come_back(self, guest: Guest) -> None:
        await self.connect(guest, tries=_MAX_RETRIES)

    def note_refusal(self, refusal: Full) -> None:
        self.counts["refusals"] += 1
        self.errors[refusal.code] += 1
        if refusal.retry_after_ms is not None:
            self.noted["retry_after_ms"].append(refusal.retry_after_ms)

    def note(self, figure: str, since: float) -> None:
        """A sample that ends now."""
        self.noted[figure].append((time.perf_counter() - since) * 1000)

    # --- what they say

    @property
    def is_late(self) -> bool:
        return time.perf_counter() - self.begun_at > self.plan.duration_s

    def numbers(self) -> Iterator[int]:
        """Numbers of turns, as many as planned or as there is time for, and one at least."""
        for number in range(self.plan.turns):
            if number and self.is_late:
                return
            yield number

    def meet(self, guest: Guest, variant: int = 0) -> None:
        """A new session of this guest, with a story of its own for each variant."""
        guest.conversation.meet(f"bench-{self._name}-{guest.user}-{variant}", self.prompts.story(guest.user, variant))

    async def warm(self, guest: Guest) -> None:
        begun = time.perf_counter()
        await guest.conversation.warm()
        self.note("warm_ms", begun)

    async def begin(self, guest: Guest, number: int, *, part: str = "", again: bool = False) -> Turn:
        utterance = self.prompts.utterance(guest.user, number)
        turn = await guest.conversation.begin(utterance, part=part, again=again)
        self.turns.append(turn)
        return turn

    async def say(self, guest: Guest, number: int, *, part: str = "", again: bool = False) -> Turn:
        """One turn to its end. Raises `Refused` where the connection did not survive it."""
        turn = await self.begin(guest, number, part=part, again=again)
        await self.over(guest, turn)
        return turn

    async def over(self, guest: Guest, turn: Turn) -> None:
        """Waits for the end of a turn. Raises `Refused` as above; one that takes too long ends the connection."""
        await self._within_limit(guest, turn, turn.over.wait())

    async def reaches(self, guest: Guest, turn: Turn, frames: int) -> bool:
        return bool(await self._within_limit(guest, turn, turn.reaches(frames)))

    async def _within_limit(self, guest: Guest, turn: Turn, wait: Awaitable[bool]) -> bool:
        reached = False
        try:
            async with asyncio.timeout(self.plan.turn_timeout_s):
                reached = await wait
        except TimeoutError:
            turn.end("failed", time.perf_counter(), "timeout")
            guest.conversation.drop()
        if turn.outcome == "failed" and turn.error in ("timeout", "closed", f"closed_{guest.conversation.closed_code}"):
            raise Refused(f"the connection ended in a turn: {turn.error}")
        return reached

    async def freed(self, since: float) -> None:
        """Notes when the server's engines have nothing to do any more, from `since` on."""
        while time.perf_counter() - since < _FREED_LIMIT_S:
            if await self.target.idle_streams() == 0:
                self.note("cancel_to_freed_ms", since)
                return
            await asyncio.sleep(0.001)
        raise Refused(f"still busy after {_FREED_LIMIT_S:.0f} s; is the server used by others, too?")
