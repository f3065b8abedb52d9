"""client/sync.py: the client without async, as programs use it: from plain threads."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import service
from fakes import Gate, Script, ScriptedEngine

from yaptext.client import Ack, AuthenticationFailed, Done, Final, Token, ToolCall, UnknownPersona
from yaptext.client import Turn as AsyncTurn
from yaptext.client import Yap as AsyncYap
from yaptext.client.sync import Turn, Yap, connect
from yaptext.engine.base import Engines

LAMP = {"name": "lamp", "description": "Switches a lamp."}


async def against(engine: ScriptedEngine, use: Callable[[str], None]) -> None:
    """Runs `use` in a thread, with the address of a service."""
    async with service(Engines(engine, engine)) as running:
        await asyncio.to_thread(use, running.ws)


def public(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")}


def test_it_has_the_same_names() -> None:
    """With the same arguments, without those that its own parts use."""
    own = {"open", "close", "begin", "cancel", "answer", "take", "fail", "stop", "stopped"}
    for twin, original, used in ((Yap, AsyncYap, own), (Turn, AsyncTurn, own - {"begin", "cancel"})):
        there, here = public(original), public(twin)
        assert there.keys() - used <= here.keys() | {"session_id"}, original
        for name in there.keys() & here.keys():
            if inspect.isfunction(there[name]):
                assert [*inspect.signature(there[name]).parameters] == [*inspect.signature(here[name]).parameters]


async def test_a_conversation() -> None:
    """Turns, a decision, the session, a warm-up."""

    def use(url: str) -> None:
        with connect(url, "yap_token", session_id="s") as yap:
            with yap.turn("remember four") as turn:
                kinds = [type(event) for event in turn]
            assert kinds == [Ack, ToolCall, Token, Token, Token, Final, Done]
            assert (turn.text, turn.number, turn.finish_reason, turn.cancelled, turn.over) == (
                "Hello there.",
                1,
                "stop",
                False,
                True,
            )
            assert turn.decision and turn.usage and turn.timings and turn.ack and turn.dones and turn.decisions
            with yap.turn("and?") as turn:
                assert list(turn.text_stream) == ["Hello", " there", "."]
            assert yap.turn("more").begin().result().text == "Hello there."
            assert yap.set_persona(persona_style="savage").persona_style == "savage"
            assert yap.warm(persona_style="savage").persona_style == "savage"
            assert yap.get_session().turns == 3 and yap.session_id == "s" and yap.ping() > 0
            with pytest.raises(UnknownPersona):
                yap.set_persona(persona_style="nope")
            with pytest.raises(TypeError):
                yap.turn("hi", persona="nope")  # type: ignore[call-arg]
            assert yap.forget().known
        with pytest.raises(AuthenticationFailed), connect(url, "wrong"):
            pytest.fail("a wrong key")
        assert not [thread for thread in threading.enumerate() if thread.name == "yaptext.client"]

    await against(ScriptedEngine(), use)


async def test_barge_in_and_cancel() -> None:
    """A new turn ends the running one, a cancel keeps what was heard, leaving the block early cancels."""
    gate, engine = Gate(), ScriptedEngine()
    loop = asyncio.get_running_loop()

    def use(url: str) -> None:
        with connect(url, "yap_token") as yap:
            engine.chat = Script(["Once", " upon", " a"], pace=gate)
            old = yap.turn("a story").begin()
            loop.call_soon_threadsafe(gate.step)
            assert next(old.text_stream) == "Once"
            with yap.turn("another") as turn:
                assert isinstance([*old][-1], Done) and old.cancelled
                loop.call_soon_threadsafe(gate.step, 2)
                stream = turn.text_stream
                assert next(stream) + next(stream) == "Once upon"
                turn.cancel(heard_text="once")
                assert turn.cancelled
            assert yap.get_session().history[-1].content == "Once"
            with yap.turn("a third") as turn:
                pass
            assert turn.cancelled

    await against(engine, use)


async def test_tools() -> None:
    """Callables run in other threads; results can be given by hand."""
    engine = ScriptedEngine()
    stream, threads = engine.stream, []

    def decides(prompt: Any, sampling: Any, **options: Any) -> Any:
        if sampling.json_schema is not None:
            done = "returned" in engine.decode(prompt)
            engine.decision = Script(("[]",) if done else ('[{"name":"lamp","arguments":{}}]',))
        return stream(prompt, sampling, **options)

    def lamp() -> str:
        threads.append(threading.get_ident())
        return "it glows"

    def use(url: str) -> None:
        with connect(url, "yap_token") as yap:
            with yap.turn("Lights!", tools=[(LAMP, lamp)]) as turn:
                assert turn.result().text == "Hello there."
            assert threads and threads[0] != threading.get_ident()
            with yap.turn("Lights!", tools=[LAMP], await_tools=True, history="") as turn:
                (call,) = turn.result().calls
            with yap.tool_result(turn, {call.id: "it glows"}) as turn:
                assert turn.result().text == "Hello there."

    async with service(Engines(engine, engine)) as running:
        engine.stream = decides  # type: ignore[method-assign]
        await asyncio.to_thread(use, running.ws)
