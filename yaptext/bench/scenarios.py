"""What the users of a run do: one function of a `Run` for each scenario that `options` names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from yaptext.bench.conversation import Full
from yaptext.bench.run import Guest, Run
from yaptext.client.errors import Refused

Scenario = Callable[[Run], Awaitable[None]]

_RAMP_STEP_S = 0.02
_RAMP_REFUSALS = 3
"""Refusals after which a ramp has seen enough."""
_SLOW_START_EVERY_S = 0.25
_SLOW_CLOSE_LIMIT_S = 1.0
_FREED_TRIES = 3


async def cold(run: Run) -> None:
    """Each turn is the first of a session that shares nothing with any other."""

    async def talk(guest: Guest) -> None:
        for number in run.numbers():
            run.meet(guest, variant=number)
            await run.say(guest, number)

    async with run.crowd() as crowd:
        await run.each(crowd, talk)


async def warm(run: Run) -> None:
    """The history is told again with each turn, so that every turn is as the first one after its warm-up."""

    async def talk(guest: Guest) -> None:
        for number in run.numbers():
            await run.say(guest, number, again=True)

    async with run.crowd() as crowd:
        await run.each(crowd, lambda guest: _warmed(run, guest))
        await run.each(crowd, talk)


async def _warmed(run: Run, guest: Guest) -> None:
    run.meet(guest)
    await run.warm(guest)


async def conversation(run: Run) -> None:
    """The story is told once; what is said since, the server remembers."""

    async def talk(guest: Guest) -> None:
        run.meet(guest)
        for number in run.numbers():
            await run.say(guest, number)

    async with run.crowd() as crowd:
        await run.each(crowd, talk)


async def barge_in(run: Run) -> None:
    """Every second cut is a cancel, the others are a new `start`. At last all turns are cancelled at once, and the time
    until the engines have nothing to do is taken."""

    async def talk(guest: Guest) -> None:
        run.meet(guest)
        turn = await run.begin(guest, 0)
        for number in run.numbers():
            token = guest.random.randint(1, max(1, run.plan.sampling.max_tokens // 2))
            reached = await run.reaches(guest, turn, token)
            if reached and number % 2 == 0:
                guest.conversation.cancel()
                await run.over(guest, turn)
            cut, turn = turn, await run.begin(guest, number + 1)
            await run.over(guest, cut)
        guest.conversation.cancel()
        await run.over(guest, turn)

    async def speak(guest: Guest) -> None:
        await run.reaches(guest, await run.begin(guest, 0, part="freed"), 1)

    async with run.crowd() as crowd:
        await run.each(crowd, talk)
        try:
            for _ in range(_FREED_TRIES):
                await run.each(crowd, speak)
                if await run.target.idle_streams() == 0:
                    raise Refused("the server counts no streams while turns are running")
                cancelled_at = time.perf_counter()
                for guest in crowd:
                    guest.conversation.cancel()
                await run.freed(cancelled_at)
        except Refused as error:
            run.notes.append(f"no cancel_to_freed_ms: {error}")


async def reconnect(run: Run) -> None:
    """The sockets are cut without a goodbye, as by a network that fails."""

    async def first(guest: Guest) -> None:
        run.meet(guest)
        await run.say(guest, 0, part="before")

    async with run.crowd() as crowd:
        await run.each(crowd, first)
        for number in run.numbers():
            dropped_at = time.perf_counter()
            for guest in crowd:
                guest.conversation.drop()

            async def back(guest: Guest, number: int = number, dropped_at: float = dropped_at) -> None:
                await run.come_back(guest)
                turn = await run.say(guest, number + 1)
                if turn.arrivals:
                    run.noted["back_ms"].append((turn.arrivals[0] - dropped_at) * 1000)

            await run.each(crowd, back)


async def ramp(run: Run) -> None:
    """Each socket that comes speaks once and stays. After three refusals one leaves, and after the wait that was asked
    for another comes into its place."""
    crowd: list[Guest] = []
    refusal: Full | None = None
    try:
        async with asyncio.TaskGroup() as group:
            while len(crowd) < run.sessions and run.counts["refusals"] < _RAMP_REFUSALS and not run.is_late:
                guest = run.guest(len(crowd))
                try:
                    await run.connect(guest)
                except Full as full:
                    refusal = full
                    run.note_refusal(full)
                    continue
                crowd.append(guest)
                run.meet(guest)
                group.create_task(run.each([guest], lambda guest: _say_once(run, guest)))
                await asyncio.sleep(_RAMP_STEP_S)
        run.counts["admitted"] += len(crowd)
        if refusal is not None and crowd:
            left_at = time.perf_counter()
            await run.leave([crowd.pop()])
            await asyncio.sleep((refusal.retry_after_ms or 0) / 1000)
            guest = run.guest(len(crowd))
            crowd.append(guest)
            await run.each([guest], run.come_back)
            run.note("readmitted_ms", left_at)
    finally:
        await run.leave(crowd)


async def _say_once(run: Run, guest: Guest) -> None:
    await run.say(guest, 0)


async def idle(run: Run) -> None:
    """Two turns without a pause come first, as what the others are to be compared with."""

    async def talk(guest: Guest) -> None:
        for number in range(2):
            await run.say(guest, number, part="busy", again=True)
        for number in run.numbers():
            await asyncio.sleep(run.plan.gap_s)
            await run.say(guest, number + 2, again=True)

    async with run.crowd() as crowd:
        await run.each(crowd, lambda guest: _warmed(run, guest))
        await run.each(crowd, talk)


async def slow_reader(run: Run) -> None:
    """The turns of the one that reads nothing are not noted: only what they do to the others is."""

    async def calm(guest: Guest) -> None:
        for number in run.numbers():
            await run.say(guest, number, part="calm", again=True)

    async def disturbed(guest: Guest) -> None:
        for number in range(run.plan.turns):
            await run.say(guest, number, again=True)

    async with run.crowd(more=1) as crowd:
        if len(crowd) < 2:
            run.notes.append("needs two places; the server gave fewer")
            return
        *others, slow = crowd
        await run.each(crowd, lambda guest: _warmed(run, guest))
        await run.each(others, calm)
        stalling = asyncio.create_task(_stall(run, slow))
        try:
            await run.each(others, disturbed)
        finally:
            stalling.cancel()
            await asyncio.wait([stalling])
        slow.conversation.resume_reading()
        slow.conversation.cancel()
        try:
            async with asyncio.timeout(_SLOW_CLOSE_LIMIT_S):
                await slow.conversation.gone.wait()
            run.notes.append(f"the slow reader was closed with {slow.conversation.closed_code}")
        except TimeoutError:
            run.notes.append("the slow reader was not closed: its buffers took all")


async def _stall(run: Run, guest: Guest) -> None:
    """Speaks on and on and reads nothing, as a phone does whose network lets only one way through."""
    guest.conversation.pause_reading()
    number = 0
    while True:
        await guest.conversation.begin(run.prompts.utterance(guest.user, number), again=True)
        number += 1
        await asyncio.sleep(_SLOW_START_EVERY_S)


SCENARIOS: dict[str, Scenario] = {
    "cold": cold,
    "warm": warm,
    "conversation": conversation,
    "barge-in": barge_in,
    "reconnect": reconnect,
    "ramp": ramp,
    "idle": idle,
    "slow-reader": slow_reader,
}
