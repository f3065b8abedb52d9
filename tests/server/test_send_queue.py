"""server/send_queue.py: the order of frames, tokens that leave together, what is taken back, how much may wait."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yaptext.server.send_queue import SendQueue
from yaptext.wire.frames import Error, Final, Pong

LONG_S = 60.0
"""A gathering that no test waits for: what comes earlier came for another reason."""


class Socket:
    """The far end: takes frames while `reading` is set, and tells when it has some."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self.stalled = asyncio.Event()
        self._news = asyncio.Condition()

    async def send(self, frame: str) -> None:
        if not self.reading.is_set():
            self.stalled.set()
        await self.reading.wait()
        async with self._news:
            self.frames.append(json.loads(frame))
            self._news.notify_all()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: len(self.frames) >= count)

    def told(self) -> list[str]:
        """Each frame in short: the text of tokens, the message of errors, the type of others."""
        return [frame.get("text") or frame.get("message") or frame["type"] for frame in self.frames]


class Case:
    """An outbox, its socket, its running writer, and how often it overflowed."""

    def __init__(self, *, max_bytes: int = 100_000, flush_s: float = 0) -> None:
        self.overflows = 0
        self.outbox = SendQueue(max_bytes=max_bytes, flush_s=flush_s, on_overflow=self._overflow)
        self.socket = Socket()

    def _overflow(self) -> None:
        self.overflows += 1

    async def stall(self) -> None:
        """Has the socket take no more; one frame is then stuck in it."""
        self.socket.reading.clear()
        self.outbox.put(Pong())
        await self.socket.stalled.wait()

    async def finish(self) -> list[str]:
        """Lets everything out; returns what the socket got."""
        self.socket.reading.set()
        self.outbox.finish()
        async with asyncio.timeout(60):
            await self.writer
        return self.socket.told()


@asynccontextmanager
async def writing(**bounds: Any) -> AsyncIterator[Case]:
    case = Case(**bounds)
    async with asyncio.TaskGroup() as group:
        case.writer = group.create_task(case.outbox.write(case.socket.send))
        yield case
        case.writer.cancel()


def note(text: str) -> Error:
    return Error(error_code="internal", message=text)


async def others_run() -> None:
    """Gives every task that is ready its turn, so that the writer waits for what comes next."""
    for _ in range(5):
        await asyncio.sleep(0)


# Order


async def test_frames_leave_in_their_order() -> None:
    """Tokens and other frames alike, whoever waits for whom."""
    async with writing() as case:
        tokens = case.outbox.open(1)
        for word in ("a", "b"):
            tokens.push(word, 1)
            case.outbox.put(note(f"after {word}"))
            await case.socket.until(2)
        case.outbox.put(Final(normalized_text="ab", turn=1))
        assert await case.finish() == ["a", "after a", "b", "after b", "final"]


async def test_a_token_is_sent_at_once() -> None:
    """Without a flush time nothing is held back: each token has left before the next comes."""
    async with writing() as case:
        tokens = case.outbox.open(1)
        for count, word in enumerate("abc", 1):
            tokens.push(word, 1)
            await case.socket.until(count)
        assert case.socket.frames == [{"type": "token", "text": word, "turn": 1} for word in "abc"]


async def test_tokens_that_wait_together_leave_in_one_frame() -> None:
    """A slow client gets fewer, longer frames; model tokens are counted all the same."""
    async with writing() as case:
        await case.stall()
        tokens = case.outbox.open(1)
        for word in ("a", "b", "c"):
            tokens.push(word, 2)
        assert tokens.sent_tokens == 0
        assert await case.finish() == ["pong", "abc"]
        assert tokens.sent_tokens == 6


async def test_tokens_of_two_turns_are_not_merged() -> None:
    """Each frame is of one turn."""
    async with writing() as case:
        await case.stall()
        one, two = case.outbox.open(1), case.outbox.open(2)
        one.push("a", 1)
        two.push("b", 1)
        one.push("c", 1)
        await case.finish()
        assert [(frame["text"], frame["turn"]) for frame in case.socket.frames[1:]] == [("ac", 1), ("b", 2)]


async def test_a_writer_that_waits_is_woken() -> None:
    """Whatever comes first: a frame, a token, or the end."""
    for first in ("frame", "token", "end"):
        async with writing() as case:
            await others_run()
            if first == "frame":
                case.outbox.put(Pong())
            elif first == "token":
                case.outbox.open(1).push("a", 1)
            assert await case.finish() == {"frame": ["pong"], "token": ["a"], "end": []}[first]


async def test_the_end_comes_after_what_waits() -> None:
    """All that was put before `finish` is written, and nothing that is put after it."""
    async with writing() as case:
        await case.stall()
        case.outbox.open(1).push("a", 1)
        case.outbox.put(note("b"))
        case.outbox.finish()
        case.outbox.put(note("late"))
        assert await case.finish() == ["pong", "a", "b"]


async def test_a_socket_that_fails_ends_the_writer() -> None:
    """The writer's task raises what the transport raised."""

    async def send(_: str) -> None:
        raise ConnectionResetError

    outbox = Case().outbox
    outbox.put(Pong())
    with pytest.raises(ConnectionResetError):
        await outbox.write(send)


# Taking back


async def test_what_waits_can_be_taken_back() -> None:
    """After `retract` no token of the turn follows, and what was handed to the socket is known."""
    async with writing() as case:
        tokens = case.outbox.open(1)
        tokens.push("said", 1)
        await case.socket.until(1)
        await case.stall()
        tokens.push("unsaid", 3)
        case.outbox.put(note("done"))
        assert tokens.retract() == "said"
        assert tokens.sent_tokens == 1
        assert await case.finish() == ["said", "pong", "done"]


async def test_what_is_stuck_in_the_socket_counts_as_sent() -> None:
    """It cannot be taken back: the client will read it."""
    async with writing() as case:
        case.socket.reading.clear()
        tokens = case.outbox.open(1)
        tokens.push("stuck", 1)
        await case.socket.stalled.wait()
        tokens.push("waits", 1)
        assert tokens.retract() == "stuck"
        assert await case.finish() == ["stuck"]


async def test_nothing_is_taken_back_from_nothing() -> None:
    """A turn that said nothing, and one that is asked twice."""
    async with writing() as case:
        tokens = case.outbox.open(1)
        assert tokens.retract() == tokens.retract() == ""
        assert await case.finish() == []


async def test_tokens_after_a_retract_are_sent_once() -> None:
    """What was taken back does not come again with what follows."""
    async with writing() as case:
        await case.stall()
        tokens = case.outbox.open(1)
        tokens.push("a", 1)
        tokens.retract()
        tokens.push("b", 1)
        assert await case.finish() == ["pong", "b"]


# How much may wait


async def test_a_client_that_does_not_keep_up_is_told_of_once() -> None:
    """Over the bound the callback is called, and called no more while the rest piles up."""
    async with writing(max_bytes=1000) as case:
        await case.stall()
        tokens = case.outbox.open(1)
        tokens.push("x" * 900, 1)
        assert case.overflows == 0
        for _ in range(5):
            tokens.push("x" * 200, 1)
            case.outbox.put(note("x" * 200))
        assert case.overflows == 1


@pytest.mark.parametrize("kind", ["tokens", "frames", "both"])
async def test_frames_count_until_they_have_left(kind: str) -> None:
    """What was sent waits no more: a client that keeps up may get any amount."""
    async with writing(max_bytes=1000) as case:
        for turn in range(1, 51):
            tokens = case.outbox.open(turn)
            before = len(case.socket.frames)
            if kind != "frames":
                tokens.push("x" * 100, 1)
                tokens.push("y" * 100, 1)
            if kind != "tokens":
                case.outbox.put(note("z" * 300))
            await case.socket.until(before + (2 if kind == "both" else 1))
        assert case.overflows == 0


@pytest.mark.parametrize("also_sent", [False, True])
async def test_what_is_taken_back_counts_no_more(also_sent: bool) -> None:
    """Barge-in after barge-in on a stalled socket leaves nothing behind."""
    async with writing(max_bytes=1000) as case:
        tokens = case.outbox.open(1)
        if also_sent:
            tokens.push("x" * 100, 1)
            await case.socket.until(1)
        await case.stall()
        for turn in range(2, 50):
            tokens.push("x" * 300, 1)
            tokens.push("x" * 300, 1)
            tokens.retract()
            tokens = case.outbox.open(turn)
        assert case.overflows == 0


@pytest.mark.parametrize("kind", ["tokens", "frames"])
async def test_what_waits_is_counted_in_bytes(kind: str) -> None:
    """An emoji is four bytes on the wire, and as many of the bound."""
    async with writing(max_bytes=1000) as case:
        await case.stall()
        if kind == "tokens":
            case.outbox.open(1).push("🫠" * 300, 300)
        else:
            case.outbox.put(note("🫠" * 300))
        assert case.overflows == 1


# Gathering


async def test_tokens_after_the_first_gather() -> None:
    """The first token of a turn leaves at once; those within the flush time after it leave together."""
    async with writing(flush_s=0.3) as case:
        tokens = case.outbox.open(1)
        tokens.push("a", 1)
        await case.socket.until(1)
        for word in ("b", "c", "d"):
            tokens.push(word, 1)
            await others_run()
        assert case.socket.told() == ["a"]
        await case.socket.until(2)
        assert case.socket.told() == ["a", "bcd"]


async def test_a_token_after_the_flush_time_leaves_at_once() -> None:
    """Slow tokens are not made slower."""
    async with writing(flush_s=0.01) as case:
        tokens = case.outbox.open(1)
        for count, word in enumerate("abc", 1):
            tokens.push(word, 1)
            await case.socket.until(count)
            await asyncio.sleep(0.02)
        assert case.socket.told() == ["a", "b", "c"]


@pytest.mark.parametrize("what", ["frame", "end"])
async def test_any_other_frame_takes_gathering_tokens_along(what: str) -> None:
    """Nobody waits for the flush time once there is something else to send, or nothing more to come."""
    async with writing(flush_s=LONG_S) as case:
        tokens = case.outbox.open(1)
        tokens.push("a", 1)
        await case.socket.until(1)
        tokens.push("b", 1)
        await others_run()
        tokens.push("c", 1)
        if what == "frame":
            case.outbox.put(note("final"))
            await case.socket.until(3)
        assert await case.finish() == (["a", "bc", "final"] if what == "frame" else ["a", "bc"])


async def test_the_first_token_of_the_next_turn_does_not_gather() -> None:
    """Time to the first token is what a user feels."""
    async with writing(flush_s=LONG_S) as case:
        for turn in (1, 2, 3):
            case.outbox.open(turn).push(f"turn {turn}", 1)
            await case.socket.until(turn)
        assert case.socket.told() == ["turn 1", "turn 2", "turn 3"]


async def test_gathering_tokens_can_be_taken_back() -> None:
    """A barge-in while tokens gather drops them, and its `done` leaves at once."""
    async with writing(flush_s=LONG_S) as case:
        tokens = case.outbox.open(1)
        tokens.push("a", 1)
        await case.socket.until(1)
        tokens.push("b", 1)
        await others_run()
        assert tokens.retract() == "a"
        case.outbox.put(note("done"))
        await case.socket.until(2)
        assert await case.finish() == ["a", "done"]


# Any order of things

steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["push", "retract"]), st.integers(1, 3)),
        st.tuples(st.sampled_from(["put", "stall", "read", "run"]), st.just(0)),
    ),
    max_size=40,
)


@given(steps, st.sampled_from([0.0, LONG_S]))
@settings(max_examples=200, deadline=None)
async def test_nothing_is_lost_doubled_or_overtaken(steps: list[tuple[str, int]], flush_s: float) -> None:
    """Whatever is put, pushed and taken back, and however the client reads: each turn's tokens are those that were
    not taken back, frames keep their order, and no frame comes before a token that is older."""
    async with writing(flush_s=flush_s) as case:
        tokens = {turn: case.outbox.open(turn) for turn in (1, 2, 3)}
        waiting: dict[int, list[str]] = defaultdict(list)
        wanted: dict[int, str] = {turn: "" for turn in tokens}
        frames: list[str] = []
        older: dict[str, set[str]] = {}
        for number, (step, turn) in enumerate(steps):
            mark = f"[{number}]"
            match step:
                case "push":
                    tokens[turn].push(mark, 1)
                    waiting[turn].append(mark)
                case "retract":
                    said = tokens[turn].retract()
                    assert (wanted[turn] + "".join(waiting[turn])).startswith(said)
                    wanted[turn] = said
                    waiting[turn].clear()
                case "put":
                    case.outbox.put(note(mark))
                    frames.append(mark)
                    older[mark] = {token for pushed in waiting.values() for token in pushed}
                case "stall":
                    case.socket.reading.clear()
                case "read":
                    case.socket.reading.set()
                case _:
                    await others_run()
        told = await case.finish()
        assert [text for text in told if text in frames] == frames
        for turn, stream in tokens.items():
            sent = "".join(frame["text"] for frame in case.socket.frames if frame.get("turn") == turn)
            assert sent == wanted[turn] + "".join(waiting[turn])
            assert stream.sent_tokens == sent.count("[")
        for mark, before in older.items():
            rest = "".join(told[told.index(mark) :])
            assert not [token for token in before if token in rest and token != mark]
        assert case.overflows == 0
