"""client/tools.py: callables that answer the calls of a turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import service
from fakes import Script, ScriptedEngine

from yaptext.client import Ack, BadMessage, Done, Final, Token, ToolCall, Yap, connect
from yaptext.engine.base import CHAT, Engines

LAMP = {
    "name": "lamp",
    "description": "Switches a lamp.",
    "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
}
CALL = '[{"name":"lamp","arguments":{"on":true}}]'


class Deciding(ScriptedEngine):
    """Calls for each utterance, until a result is there."""

    call = CALL

    def stream(self, prompt: Any, sampling: Any, **options: Any) -> Any:
        if sampling.json_schema is not None:
            self.decision = Script(("[]",) if "returned" in self.decode(prompt) else (self.call,))
        return super().stream(prompt, sampling, **options)

    @property
    def told(self) -> str:
        """The prompt of the last reply."""
        asked = [ids for ids, sampling, priority in self.requests if priority == CHAT and not sampling.json_schema]
        return self.decode(asked[-1])


@asynccontextmanager
async def talking(engine: ScriptedEngine) -> AsyncIterator[Yap]:
    async with service(Engines(engine, engine)) as running, connect(running.ws, "yap_token") as yap:
        yield yap


async def test_a_callable_answers_and_the_turn_goes_on() -> None:
    """Events of both turns of the service in one iteration, up to the answer, which knows the result. Usage is of
    both."""
    engine, seen = Deciding(), []

    async def lamp(on: bool) -> str:
        seen.append(on)
        return "the lamp glows"

    async with talking(engine) as yap:
        async with yap.turn("Lights!", tools=[(LAMP, lamp)]) as turn:
            events = [event async for event in turn]
        kinds = [type(event) for event in events if not isinstance(event, Token)]
        assert kinds == [Ack, ToolCall, Done, Ack, ToolCall, Final, Done]
        assert seen == [True] and "the lamp glows" in engine.told and turn.text == "Hello there."
        assert turn.decision is not None and (turn.decision.status, turn.decision.raw[0].name) == ("yes", "lamp")
        assert [decision.status for decision in turn.decisions] == ["yes", "no"]
        assert (turn.number, turn.calls, turn.cancelled, turn.finish_reason) == (2, [], False, "stop")
        first, last = (done.usage for done in turn.dones)
        assert turn.usage is not None and first and last
        assert turn.usage.tool_prompt_tokens == first.tool_prompt_tokens + last.tool_prompt_tokens > 0


async def test_the_session_keeps_its_callables() -> None:
    """As the service keeps the tools; None takes both away."""
    engine, seen = Deciding(), []
    async with talking(engine) as yap:
        async with yap.turn("Lights!", tools=[(LAMP, lambda on: seen.append(on) or None)]) as turn:
            await turn.result()
        async with yap.turn("Again!", history="") as turn:
            await turn.result()
        assert seen == [True, True]
        engine.call = "[]"
        async with yap.turn("Again!", tools=None, history="") as turn:
            await turn.result()
        assert len(seen) == 2 and (await yap.get_session()).tools is None


async def test_callables_for_the_tools_of_the_service() -> None:
    """By name, without schemas."""
    engine, seen = Deciding(), []
    engine.call = '[{"name":"play_music","arguments":{"query":"jazz"}}]'
    async with talking(engine) as yap:
        async with yap.turn("play jazz", tools={"play_music": lambda query: seen.append(query) or None}) as turn:
            await turn.result()
        assert seen == ["jazz"] and turn.text == "Hello there."


class Odd:
    """JSON has no such thing."""


def fails(on: bool) -> str:
    raise ValueError("the bulb is broken")


@pytest.mark.parametrize(
    ("lamp", "told"),
    [
        (fails, "error: the bulb is broken"),
        (lambda: "no argument", "error: "),
        (lambda on: Odd(), "error: "),
        (lambda on: {"state": ["on", 3]}, '"state"'),
        (lambda on: asyncio.sleep(0, "it glows"), "it glows"),
    ],
)
async def test_what_a_callable_returns_or_raises_is_its_result(lamp: Any, told: str) -> None:
    """A failure is a text for the model, without a traceback. JSON is sent as JSON."""
    engine = Deciding()
    async with talking(engine) as yap:
        async with yap.turn("Lights!", tools=[(LAMP, lamp)]) as turn:
            await turn.result()
    assert turn.text == "Hello there." and told in engine.told and "Traceback" not in engine.told


async def test_a_plain_function_does_not_block_the_loop() -> None:
    """It runs in a thread, so that other turns and the socket go on."""
    engine, threads = Deciding(), []
    async with talking(engine) as yap:
        async with yap.turn("Lights!", tools=[(LAMP, lambda on: threads.append(threading.get_ident()))]) as turn:
            await turn.result()
    assert threads and threads[0] != threading.get_ident()


async def test_calls_run_at_the_same_time_and_a_tool_without_callable_is_an_error() -> None:
    """All results go in one frame, each with its id."""
    engine = Deciding()
    engine.call = f'{CALL[:-1]},{CALL[1:-1]},{{"name":"bell","arguments":{{}}}}]'
    both = asyncio.Barrier(2)

    async def lamp(on: bool) -> str:
        await both.wait()
        return "it glows"

    async with talking(engine) as yap:
        async with asyncio.timeout(30):
            async with yap.turn("Lights!", tools=[(LAMP, lamp), {"name": "bell", "description": "Rings."}]) as turn:
                await turn.result()
    assert engine.told.count("it glows") == 2 and "error: bell is not available" in engine.told


async def test_without_callables_the_calls_are_in_the_decision() -> None:
    """`tool_result` begins the turn that answers. An id that is unknown is refused."""
    engine = Deciding()
    async with talking(engine) as yap:
        async with yap.turn("Lights!", tools=[LAMP], await_tools=True) as turn:
            await turn.result()
        assert turn.finish_reason == "tool_calls" and turn.decision is not None and not turn.cancelled
        (call,) = turn.calls
        assert (call.name, call.arguments) == ("lamp", {"on": True}) and turn.decision.raw == [call]
        with pytest.raises(BadMessage):
            await yap.tool_result(turn, {"other": "x"})
        async with await yap.tool_result(turn, {call.id: {"lit": True}}) as answer:
            assert (await answer.result()).text == "Hello there."
        assert "lit" in engine.told and answer.number == 2


async def test_without_await_the_reply_follows_at_once() -> None:
    """The service's default."""
    engine = Deciding()
    async with talking(engine) as yap:
        async with yap.turn("Lights!", tools=[LAMP]) as turn:
            await turn.result()
        assert turn.decision is not None and turn.decision.status == "yes"
        assert (turn.text, turn.calls) == ("Hello there.", [])


async def test_a_barge_in_while_a_callable_runs() -> None:
    """It is cancelled, its result is not sent, and the old turn ends."""
    engine, running, left = Deciding(), asyncio.Event(), asyncio.Event()

    async def lamp(on: bool) -> str:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        return "never"

    async with talking(engine) as yap:

        async def asks() -> Any:
            async with yap.turn("Lights!", tools=[(LAMP, lamp)]) as turn:
                return await turn.result()

        asking = asyncio.create_task(asks())
        await running.wait()
        engine.call = "[]"
        async with yap.turn("Never mind") as turn:
            assert (await turn.result()).text == "Hello there."
        old = await asking
        assert old.cancelled and old.text == "" and left.is_set() and turn.number == 2


async def test_a_cancel_while_a_callable_runs() -> None:
    """The iteration ends."""
    engine, running = Deciding(), asyncio.Event()

    async def lamp(on: bool) -> None:
        running.set()
        await asyncio.Event().wait()

    async with talking(engine) as yap:
        async with yap.turn("Lights!", tools=[(LAMP, lamp)]) as turn:
            reading = asyncio.create_task(turn.result())
            await running.wait()
            await turn.cancel()
            await reading
        assert turn.cancelled and turn.over
        assert (await yap.get_session()).turns == 1
