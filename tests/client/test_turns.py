"""client/client.py, client/turn.py: turns with the real service, from first to last frame."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, service, until
from fakes import Gate, Script, ScriptedEngine

from yaptext.client import (
    Ack,
    BadMessage,
    Done,
    Final,
    RateLimited,
    Token,
    ToolCall,
    UnknownPersona,
    Yap,
    connect,
)
from yaptext.engine.base import CHAT, WARM, Engines

KEY = "yap_token"


def prompt(engine: ScriptedEngine) -> str:
    """What the engine was asked last by a reply."""
    asked = [ids for ids, sampling, priority in engine.requests if priority == CHAT and sampling.json_schema is None]
    return engine.decode(asked[-1])


def limited(folder: Path, limits: str) -> dict[str, Path]:
    """Settings in which the key has these limits."""
    file = folder / "keys"
    file.write_text(f"phone sha256:{hashlib.sha256(KEY.encode()).hexdigest()} {limits}\n")
    file.chmod(0o600)
    return {"YAP_TEXT_KEY_FILE": file}


@asynccontextmanager
async def talking(engine: ScriptedEngine, **variables: Any) -> AsyncIterator[tuple[Running, Yap]]:
    async with service(Engines(engine, engine), **variables) as running:
        async with connect(running.ws, KEY, session_id="s") as yap:
            yield running, yap


async def test_a_conversation_of_two_turns() -> None:
    """Typed events in the order of the protocol, and what a turn was at its end; the second turn knows the first."""
    engine = ScriptedEngine()
    async with talking(engine) as (_, yap):
        async with yap.turn("remember four", persona_text="You are Ada.", sampling={"max_tokens": 9}) as turn:
            events = [event async for event in turn]
        assert [type(event) for event in events] == [Ack, ToolCall, Token, Token, Token, Final, Done]
        assert (turn.text, turn.number, turn.finish_reason, turn.cancelled) == ("Hello there.", 1, "stop", False)
        assert turn.decision is not None and (turn.decision.status, turn.decision.raw, turn.calls) == ("no", [], [])
        assert turn.usage is not None and turn.usage.completion_tokens == 3 and turn.usage.prompt_tokens > 0
        assert turn.timings is not None and turn.timings.total_ms is not None
        assert turn.timings.ttft_ms is not None and turn.timings.total_ms >= turn.timings.ttft_ms > 0
        async with yap.turn("the sum?") as turn:
            assert [piece async for piece in turn.text_stream] == ["Hello", " there", "."]
        assert turn.number == 2
    for text in ("You are Ada.", "remember four", "Hello there.", "the sum?"):
        assert text in prompt(engine), text


async def test_result_reads_to_the_end() -> None:
    """Without a loop."""
    async with talking(ScriptedEngine()) as (_, yap):
        async with yap.turn("hi") as turn:
            assert (await turn.result()).text == "Hello there."


async def test_the_fields_of_a_start_arrive() -> None:
    """A history as text or as messages, what was heard, a note; None clears, absent keeps."""
    engine = ScriptedEngine()
    async with talking(engine) as (_, yap):
        history = [{"role": "user", "content": "I am Bo"}, {"role": "assistant", "content": "Hello Bo and all"}]
        async with yap.turn("who?", history=history, heard_text="hello bo", note="It rains.") as turn:
            await turn.result()
        assert "I am Bo" in prompt(engine) and "It rains." in prompt(engine) and "and all" not in prompt(engine)
        async with yap.turn(None, history="User: I am Cy\nAssistant: Yes", persona_style="savage") as turn:
            await turn.result()
        assert "I am Cy" in prompt(engine) and "Bo" not in prompt(engine)
        assert turn.ack is not None and turn.ack.persona_style == "savage"
        async with yap.turn("hi") as turn:
            await turn.result()
        assert turn.ack is not None and turn.ack.persona_style == "savage"
        async with yap.turn("hi", persona_style=None) as turn:
            await turn.result()
        assert turn.ack is not None and turn.ack.persona_style != "savage"


async def test_a_misspelt_field_is_no_field() -> None:
    """The service would ignore it."""
    async with talking(ScriptedEngine()) as (_, yap):
        with pytest.raises(TypeError, match="unknown field 'persona_stile'; known are "):
            yap.turn("hi", persona_stile="savage")  # type: ignore[call-arg]
        with pytest.raises(BadMessage, match=r"Expected str . null, got int - at \$.user_utterance"):
            yap.turn(7)  # type: ignore[arg-type]


async def test_a_new_turn_ends_the_running_one() -> None:
    """Barge-in from another task: the iteration of the old turn ends with its cancelled `done`, the new one answers,
    and leaving the old one's block does not disturb it."""
    gate, engine = Gate(), ScriptedEngine()
    async with talking(engine) as (_, yap):
        engine.chat = Script(["Once", " upon", " a", " time"], pace=gate)
        spoke = asyncio.Event()
        events: list[Any] = []

        async def story() -> Any:
            async with yap.turn("a story") as old:
                async for event in old:
                    events.append(event)
                    if isinstance(event, Token):
                        spoke.set()
            return old

        telling = asyncio.create_task(story())
        gate.step()
        await spoke.wait()
        engine.chat = Script(["Stopped."])
        async with yap.turn("stop", heard_text="on") as turn:
            assert (await turn.result()).text == "Stopped."
        old = await telling
        assert old.cancelled and old.text == "Once" and old.finish_reason == "cancelled"
        assert isinstance(events[-1], Done) and events[-1].cancelled
        assert not turn.cancelled and "Once" not in prompt(engine)


async def test_a_cancel_keeps_what_was_heard() -> None:
    """The words, or a number of characters. `cancel` returns at the end of the turn, which the iteration then shows."""
    for heard in ({"heard_text": "once upon"}, {"heard_chars": 9}):
        engine = ScriptedEngine()
        async with talking(engine) as (_, yap):
            gate = Gate()
            engine.chat = Script(["Once", " upon", " a", " time"], pace=gate)
            async with yap.turn("a story", history=None) as turn:
                gate.step(3)
                while turn.text != "Once upon a":
                    await anext(turn)
                await turn.cancel(**heard)  # type: ignore[arg-type]
                assert turn.over and turn.cancelled
                rest = [event async for event in turn]
                assert isinstance(rest[-1], Done)
            state = await yap.get_session()
            assert state.history[-1].content == "Once upon"


async def test_playback_that_was_cut_after_the_end() -> None:
    """The reply was sent whole. As long as no other turn has begun, what was heard can still be said."""
    async with talking(ScriptedEngine()) as (_, yap):
        async with yap.turn("hi") as first:
            await first.result()
        await first.cancel()
        assert (await yap.get_session()).history[-1].content == "Hello there."
        await first.cancel(heard_text="hello")
        assert (await yap.get_session()).history[-1].content == "Hello"
        async with yap.turn("more") as turn:
            await turn.result()
        await first.cancel(heard_chars=0)
        assert [item.content for item in (await yap.get_session()).history[1::2]] == ["Hello", "Hello there."]


async def test_leaving_the_block_early_cancels_the_turn() -> None:
    """By a break, an error or a cancelled task: nothing is left in the engine."""
    gate, engine = Gate(), ScriptedEngine()
    async with talking(engine) as (_, yap):
        engine.chat = Script(["Once", " upon", " a", " time"], pace=gate)
        async with yap.turn("one") as turn:
            gate.step()
            async for event in turn:
                if isinstance(event, Token):
                    break
        assert turn.over and turn.cancelled
        with pytest.raises(ZeroDivisionError):
            async with yap.turn("two") as turn:
                raise ZeroDivisionError
        assert turn.cancelled

        async def listens() -> None:
            nonlocal turn
            async with yap.turn("three") as turn:
                await turn.result()

        task = asyncio.create_task(listens())
        await until(lambda: engine.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert turn.cancelled
        await until(lambda: engine.running == 0)
        assert (await yap.get_session()).turns == 3


async def test_a_caller_that_stops_waiting_leaves_nothing_behind() -> None:
    """A start whose caller is cancelled before the ack is cancelled at the service; a later call gets its own
    answer."""
    aborting, engine = Gate(), ScriptedEngine()
    async with talking(engine) as (_, yap):
        engine.chat, engine.aborting = Script(["a", "b"], pace=Gate()), aborting
        await yap.turn("one").begin()
        await until(lambda: engine.running == 1)
        waiting = asyncio.create_task(yap.turn("two").begin())  # its ack waits for the abort
        await until(lambda: aborting.waiting == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        engine.chat = Script(["Yes."])
        aborting.step(9)
        async with yap.turn("three") as turn:
            assert (await turn.result()).text == "Yes."
        assert turn.number == 3
        await until(lambda: engine.running == 0)


async def test_a_turn_that_is_cancelled_before_it_begins() -> None:
    """Nothing of it is sent."""
    async with talking(ScriptedEngine()) as (_, yap):
        turn = yap.turn("never")
        await turn.cancel()
        async with turn:
            assert [event async for event in turn] == []
        assert turn.cancelled and turn.over
        assert (await yap.get_session()).turns == 0


async def test_the_session_can_be_set_shown_and_forgotten() -> None:
    """Persona, turns and history as the next turn will find them; ping takes some time."""
    async with talking(ScriptedEngine()) as (_, yap):
        ack = await yap.set_persona(persona_style="savage", assistant_gender="woman")
        assert (ack.for_, ack.persona_style, ack.assistant_gender) == ("set_persona", "savage", "woman")
        async with yap.turn("hi") as turn:
            await turn.result()
        state = await yap.get_session()
        assert (state.known, state.turns, state.persona_style) == (True, 1, "savage")
        assert [item.content for item in state.history] == ["hi", "Hello there."]
        assert (await yap.forget()).known and not (await yap.get_session()).known
        assert await yap.ping() > 0


async def test_a_warm_up_is_found_by_the_turn() -> None:
    """Of a persona, and of a history."""
    history = "\n".join(f"User: what is {n}?\nAssistant: It is {n}." for n in range(30))
    async with talking(ScriptedEngine()) as (_, yap):
        warmed = await yap.warm(persona_style="savage")
        assert (warmed.segment, warmed.persona_style) == ("persona_static", "savage")
        warmed = await yap.warm(persona_style="savage", history=history)
        assert warmed.segment == "history" and warmed.messages == 60
        async with yap.turn("hi", persona_style="savage", history=history) as turn:
            await turn.result()
        assert turn.usage is not None and turn.usage.cached_tokens >= warmed.prefix_tokens > 0


class SlowWarming(ScriptedEngine):
    """A warm-up takes as long as a test likes; a turn does not."""

    gate: Gate | None = None

    async def stream(self, prompt: Any, sampling: Any, *, priority: int = CHAT) -> Any:
        if priority == WARM and self.gate is not None:
            await self.gate()
        async for delta in super().stream(prompt, sampling, priority=priority):
            yield delta


async def test_a_turn_does_not_wait_for_a_warm_up(tmp_path: Path) -> None:
    """And each of the two gets its own error."""
    engine = SlowWarming()
    async with talking(engine, DEPLOY_MODELS="chat", **limited(tmp_path, "turns_per_minute=5")) as (_, yap):
        engine.gate = gate = Gate()
        warming = asyncio.create_task(yap.warm(persona_style="savage"))
        await until(lambda: gate.waiting == 1)
        async with yap.turn("hi") as turn:
            assert (await turn.result()).text == "Hello there."
        while True:
            try:
                async with yap.turn("more") as turn:
                    await turn.result()
            except RateLimited as error:
                assert error.retry_after_ms
                break
        assert not warming.done()
        refused = asyncio.create_task(yap.set_persona(persona_style="nope"))  # whose error it is shows at the end
        await asyncio.sleep(0.05)
        gate.step(100)
        assert (await warming).segment == "persona_static"
        with pytest.raises(UnknownPersona):
            await refused
        with pytest.raises(RateLimited):
            await yap.warm(persona_style="savage")
        assert await yap.ping() > 0


async def test_a_warm_up_that_is_refused(tmp_path: Path) -> None:
    """Its error is its own, before and after the service has taken it, and the next call gets its answer."""
    async with talking(ScriptedEngine()) as (_, yap):
        for _ in range(2):
            refused = asyncio.create_task(yap.warm(persona_style="nope"))
            async with yap.turn("hi") as turn:
                await turn.result()
            with pytest.raises(UnknownPersona):
                await refused
            with pytest.raises(UnknownPersona):
                await yap.warm(persona_style="nope")
            assert await yap.ping() > 0
            assert (await yap.warm(persona_style="savage")).persona_style == "savage"
    for messages in range(2, 6):  # the warm-up is refused, or the ping that follows it
        async with talking(ScriptedEngine(), **limited(tmp_path, f"messages_per_minute={messages}")) as (_, yap):
            with pytest.raises(RateLimited):
                for _ in range(9):
                    await yap.warm(persona_style="savage")
            with pytest.raises(RateLimited):
                await yap.ping()


async def test_calls_from_many_tasks_get_their_own_answers() -> None:
    """One frame at a time waits for its answer."""
    async with talking(ScriptedEngine()) as (_, yap):

        async def bad() -> None:
            with pytest.raises(UnknownPersona):
                await yap.set_persona(persona_style="nope")

        async def blank() -> None:
            with pytest.raises(BadMessage, match="blank"):
                await yap.turn(" ").begin()

        async def state() -> None:
            assert (await yap.get_session()).session_id == "s"

        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                for call in (bad, blank, state, yap.ping):
                    group.create_task(call())  # type: ignore[operator]


async def test_closing_the_client_ends_the_turn_and_frees_the_slot() -> None:
    """Also in the middle of a reply; whatever waits hears of it."""
    engine = ScriptedEngine()
    async with service(Engines(engine, engine)) as running:
        engine.chat = Script(["a", "b"], pace=Gate())
        async with connect(running.ws, KEY) as yap:
            turn = await yap.turn("hi").begin()
        assert turn.over
        await until(lambda: running.active == 0 and engine.running == 0)


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="session")
async def test_two_turns_and_a_barge_in_on_real_vllm(vllm_engine: Any) -> None:
    """The demo answers, a story is interrupted by a question, and the answer knows the first turn."""

    class Borrowed:
        def __getattr__(self, name: str) -> Any:
            return getattr(vllm_engine, name)

        async def aclose(self, *, at_once: bool = False) -> None:
            pass

    borrowed: Any = Borrowed()
    async with service(Engines(chat=borrowed, tool=borrowed, demo=True)) as running:
        async with connect(running.ws, KEY) as yap:
            async with yap.turn("What is the capital of France?") as turn:
                await turn.result()
            assert "Paris" in turn.text and turn.decision is not None
            story = await yap.turn("Tell me a very long story about the sea.").begin()
            async for event in story:
                if isinstance(event, Token):
                    break
            async with yap.turn("And of Italy?", heard_text="") as turn:
                await turn.result()
            assert story.cancelled and turn.text and not turn.cancelled
            assert turn.usage is not None and turn.usage.cached_tokens > 0
            assert len((await yap.get_session()).history) >= 4
