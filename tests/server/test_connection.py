"""The ten rules of the protocol, on a conversation in memory, and what else a socket promises."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from conftest import Frame, MemorySocket, check_frames, talking
from fakes import Gate, Script, ScriptedCodec, ScriptedEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from yaptext.engine.base import Place
from yaptext.errors import EngineDead, EngineFailed, StartError
from yaptext.server.conversation import HANDLERS
from yaptext.wire.frames import CLIENT_MESSAGES

CALL = '[{"name": "play_music", "arguments": {"query": "mix"}}]'
YES = Script((CALL,))


@pytest.fixture(scope="module", autouse=True, params=[True, False], ids=["written-at-once", "queued"])
def writes_now(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds on both kinds of sockets."""
    MemorySocket.writes_now = request.param
    yield
    MemorySocket.writes_now = True


def ticking(ticks: list[int]) -> Any:
    """A pace that yields to the loop as many times as the next number says."""
    left = iter(ticks)

    async def pace() -> None:
        for _ in range(next(left, 0)):
            await asyncio.sleep(0)

    return pace


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def settle() -> None:
    """Lets everything run that can run."""
    for _ in range(50):
        await asyncio.sleep(0)


# --- rules 1 to 9


@settings(deadline=None)  # the machine has other work
@given(
    chat=st.lists(st.integers(0, 6), max_size=6),
    decision=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    concurrent=st.booleans(),
    yes=st.booleans(),
    interruptions=st.lists(st.tuples(st.integers(0, 25), st.sampled_from(["start", "cancel", "both"])), max_size=4),
)
def test_rule_1_no_token_precedes_its_decision_at_any_interleaving(
    chat: list[int], decision: list[int], concurrent: bool, yes: bool, interruptions: list[tuple[int, str]]
) -> None:
    """In either mode, under barge-ins and cancels at any moment, every turn's frames stand in their order."""

    async def run() -> list[Frame]:
        pieces = (CALL[:9], CALL[9:]) if yes else ("[", "]")
        engine = ScriptedEngine(
            chat=Script(("a", " b", "", " c"), pace=ticking(chat * 5)),
            decision=Script(pieces, pace=ticking(decision * 5)),
        )
        async with talking(engine, CONCURRENT_MODEL_CALL=concurrent) as talk:
            socket = talk.socket()
            socket.start()
            for ticks, what in interruptions:
                for _ in range(ticks):
                    await asyncio.sleep(0)
                if what != "start":
                    socket.say("cancel")
                if what != "cancel":
                    socket.start()
            starts = 1 + sum(what != "cancel" for _, what in interruptions)
            await socket.until(lambda frame: frame["type"] == "done" and frame["turn"] == starts)
            assert len(socket.of("ack")) == starts
            await settle()  # a cut turn is over for the client before the engine has let go
            assert engine.running == 0
            return socket.frames

    check_frames(asyncio.run(run()))


@pytest.mark.parametrize("concurrent", [False, True])
async def test_rule_2_nothing_of_a_turn_follows_its_done(concurrent: bool) -> None:
    """Deltas that an engine still had when the turn was cancelled never reach the client."""
    gate = Gate()
    async with talking(ScriptedEngine(Script(["x"] * 20, pace=gate)), CONCURRENT_MODEL_CALL=concurrent) as talk:
        socket = talk.socket()
        socket.start()
        gate.step(3)
        await socket.until("token")
        socket.say("cancel")
        done = await socket.until("done")
        gate.step(17)
        await settle()
        assert done["cancelled"] is True and socket.frames[-1] is done
        assert done["cancel_ms"] >= 0
        assert done["tokens_sent"] == 3


@pytest.mark.parametrize(("steps", "sent"), [(2, 0), (3, 3), (5, 3), (6, 6)])
async def test_rule_2_tokens_of_half_a_character_are_sent_with_it(steps: int, sent: int) -> None:
    """Three that make one smiley, and three of the next: two of six were counted."""
    pieces = ["", "", "\U0001f642", "", "", "\U0001f600", "b"]
    async with talking(ScriptedEngine(Script(pieces, pace=(gate := Gate())))) as talk:
        socket = talk.socket()
        socket.start()
        await socket.until("toolcall")
        gate.step(steps)
        await settle()
        socket.say("cancel")
        assert (await socket.until("done"))["tokens_sent"] == sent


async def test_rule_2_tokens_that_wait_for_a_slow_socket_are_dropped_by_a_cancel() -> None:
    """`done cancelled` comes right after what the socket had taken, and counts only that."""
    async with talking(ScriptedEngine(Script([f" {n}" for n in range(40)], pace=(gate := Gate())))) as talk:
        socket = talk.socket()
        socket.start()
        await socket.until("toolcall")
        socket.reading.clear()
        for _ in range(30):
            gate.step()
            await settle()
        socket.say("cancel")
        await settle()
        socket.reading.set()
        done = await socket.until("done")
        assert socket.frames[-1] is done
        assert "".join(f["text"] for f in socket.of("token")) == " 0"
        assert done["tokens_sent"] == 1


async def test_rule_3_a_start_ends_the_running_turn_first() -> None:
    """The old turn's done precedes the new turn's ack, also for a burst of starts."""
    async with talking(ScriptedEngine(Script(["x"] * 5, pace=(gate := Gate())))) as talk:
        socket = talk.socket()
        socket.start("one")
        gate.step()
        await socket.until("token")
        for utterance in ("two", "three", "four"):
            socket.start(utterance)
        gate.step(5)
        await socket.until(lambda f: f["type"] == "done" and f["turn"] == 4)
        check_frames(socket.frames)
        assert [d.get("cancelled", False) for d in socket.of("done")] == [True, True, True, False]


async def test_rule_3_a_start_on_a_second_socket_ends_the_turn_of_the_first() -> None:
    """Same key and session_id: the first socket gets its done before the second gets its ack."""
    async with talking(ScriptedEngine(Script(["x"] * 5, pace=(gate := Gate())))) as talk:
        first, second = talk.socket(), talk.socket()
        first.start("one")
        gate.step()
        await first.until("token")
        second.start("two")
        ack = await second.until("ack")
        assert first.frames[-1]["type"] == "done" and first.frames[-1]["cancelled"] is True
        assert ack["turn"] == 2
        gate.step(5)
        await second.until("done")
        assert talk.runtime.engines.chat.aborted == 1


@pytest.mark.parametrize("sockets", [1, 2])
async def test_rule_3_the_new_turn_waits_for_an_abort_that_takes_long(sockets: int) -> None:
    """However slow the engine lets go, the old done comes before the new ack. Of a burst the newest wins: the one
    before it, which has not begun, is answered at once."""
    abort = Gate()
    engine = ScriptedEngine(Script(["x"] * 3, pace=(gate := Gate())), aborting=abort)
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        first = talk.socket()
        second = first if sockets == 1 else talk.socket()
        first.start("one")
        gate.step()
        await first.until("token")
        second.start("two")
        first.start("three")
        await settle()
        assert {f["turn"] for f in first.of("ack") + second.of("ack")} == {1, 2}
        assert {f["turn"] for f in first.of("done") + second.of("done")} == {1, 2}
        abort.step()
        gate.step(3)
        await first.until(lambda f: f["type"] == "done" and f["turn"] == 3)
        check_frames(first.frames, decides=False)
        check_frames(second.frames, decides=False)


async def test_rule_3_another_key_with_the_same_session_id_is_another_session() -> None:
    """No key reaches a session of another key."""
    async with talking(ScriptedEngine(Script(["x"], pace=(gate := Gate())))) as talk:
        mine, theirs = talk.socket("mine"), talk.socket("theirs")
        mine.start()
        await mine.until("toolcall")
        theirs.start()
        await theirs.until("toolcall")
        gate.step(2)
        assert (await mine.until("done")).get("cancelled") is None
        assert (await theirs.until("done"))["turn"] == 1


async def test_rule_3_a_start_for_another_session_on_one_socket_ends_the_running_turn() -> None:
    """A socket runs one turn at a time, since `cancel` names no session."""
    async with talking(ScriptedEngine(Script(["x"] * 3, pace=(gate := Gate())))) as talk:
        socket = talk.socket()
        socket.start(session_id="a")
        gate.step()
        await socket.until("token")
        socket.start(session_id="b")
        ack = socket.frames.index(await socket.until("ack", 2))
        assert socket.frames[ack - 1]["type"] == "done"
        gate.step(3)
        await socket.until("done", 2)


async def test_rule_3_a_turn_that_ended_while_it_waited_leaves_the_wait_to_the_next() -> None:
    """The one in between has another session and asks no engine; the socket's first turn still has to let go."""
    abort = Gate()
    engine = ScriptedEngine(Script(["x"] * 3, pace=(gate := Gate())), aborting=abort)
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        for session_id in "abc":
            socket.start(session_id=session_id)
            if session_id == "a":
                gate.step()
                await socket.until("token")
            elif session_id == "b":
                await settle()
                socket.say("cancel", session_id="b")
            await settle()
        assert (len(socket.of("ack")), len(engine.requests)) == (2, 1)
        abort.step()
        gate.step(3)
        await socket.until("final")


async def test_rule_4_a_cancel_with_nothing_running_changes_nothing() -> None:
    """It answers `done cancelled` without a turn, before the first start and after a finished turn."""
    async with talking() as talk:
        socket = talk.socket()
        socket.say("cancel")
        assert (await socket.until("done")) == {
            "type": "done",
            "turn": 0,
            "cancelled": True,
            "cancel_ms": 0.0,
            "tokens_sent": 0,
        }
        socket.start()
        await socket.until(lambda f: f["type"] == "done" and f["turn"] == 1)
        before = [m.text for m in talk.runtime.sessions.open(("default", "s")).transcript.messages]
        socket.say("cancel")
        await socket.until(lambda f: f["type"] == "done" and f["turn"] == 0, 2)
        assert [m.text for m in talk.runtime.sessions.open(("default", "s")).transcript.messages] == before
        check_frames(socket.frames)


async def test_rule_5_a_cancel_is_acted_on_while_the_socket_is_stalled() -> None:
    """The engine's work stops although not one frame can leave."""
    gate = Gate()
    async with talking(ScriptedEngine(Script(["x"] * 50, pace=gate))) as talk:
        socket = talk.socket()
        socket.start()
        gate.step(2)
        await socket.until("token")
        socket.reading.clear()
        for _ in range(5):
            gate.step()
            await settle()
        socket.say("cancel")
        await settle()
        assert talk.runtime.engines.chat.aborted == 1
        assert talk.runtime.engines.chat.running == 0
        assert not socket.of("done")
        socket.reading.set()
        await socket.until("done")


@pytest.mark.parametrize(("decision", "status"), [(YES, "yes"), (Script(("[]",)), "no")])
async def test_rule_6_concurrent_chat_waits_and_then_goes_on_in_the_same_stream(decision: Script, status: str) -> None:
    """Text computed before the decision comes right after it, and nothing is computed twice."""
    gate = Gate()
    chat = ScriptedEngine(Script(["a", " b", " c"]))
    tool = ScriptedEngine(decision=Script(decision.pieces, pace=gate))
    async with talking(chat, tool, CONCURRENT_MODEL_CALL=True) as talk:
        socket = talk.socket()
        socket.start()
        await socket.until("ack")
        await settle()
        assert chat.finished == 1 and not socket.of("token")
        gate.step()
        done = await socket.until("done")
        assert [f["type"] for f in socket.frames][:3] == ["ack", "toolcall", "token"]
        assert socket.of("toolcall")[0]["status"] == status
        assert socket.of("final")[0]["normalized_text"] == "a b c"
        assert len(chat.requests) == 1 and len(tool.requests) == 1
        assert done["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script((), error=EngineFailed("no")), "engine_failed"),
        (Script(("[", "{"), finish="length"), "truncated"),
        (Script(("yes",)), "invalid"),
        (Script(('[{"name": "nuke", "arguments": {}}]',)), "invalid"),
        (Script(("[]",), pace=forever), "timeout"),
    ],
)
async def test_rule_7_a_tool_fault_is_a_no_with_its_reason(script: Script, reason: str, concurrent: bool) -> None:
    """The turn goes on without the tool, whatever the tool model did."""
    engine = ScriptedEngine(decision=script)
    async with talking(engine, CONCURRENT_MODEL_CALL=concurrent, TOOL_HARD_TIMEOUT_MS=20) as talk:
        socket = talk.socket()
        socket.start()
        await socket.until("done")
        (decision,) = socket.of("toolcall")
        assert (decision["status"], decision["raw"], decision["reason"]) == ("no", [], reason)
        assert socket.of("final")[0]["normalized_text"] == "Hello there."
        assert engine.running == 0


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("error", [EngineFailed("broken"), EngineDead("dead")])
async def test_rule_7_a_chat_failure_is_one_error_and_the_socket_lives_on(error: Exception, concurrent: bool) -> None:
    """`engine_failed` ends the turn in the place of `done`, after its decision; the next turn works."""
    engine = ScriptedEngine(Script(("a",), error=error))
    async with talking(engine, CONCURRENT_MODEL_CALL=concurrent) as talk:
        socket = talk.socket()
        socket.start()
        failed = await socket.until("error")
        assert (failed["error_code"], failed["turn"]) == ("engine_failed", 1)
        engine.chat = Script()
        socket.start()
        await socket.until("done")
        assert len(socket.of("error")) == 1 and socket.closed is None
        check_frames(socket.frames)


@settings(deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=12))
def test_rule_8_final_is_the_joined_tokens_and_usage_counts_model_tokens(pieces: list[str]) -> None:
    """Deltas without text (half a character) count as tokens and appear in no frame. A label ends no reply in turns."""

    async def run() -> MemorySocket:
        async with talking(ScriptedEngine(Script(pieces)), CHAT_PROMPT_FORMAT="turns") as talk:
            socket = talk.socket()
            socket.start()
            await socket.until("done")
            return socket

    socket = asyncio.run(run())
    text = "".join(pieces)
    assert "".join(f["text"] for f in socket.of("token")) == text
    assert socket.of("final")[0]["normalized_text"] == text
    assert socket.of("done")[0]["usage"]["completion_tokens"] == len(pieces)
    check_frames(socket.frames)


async def test_rule_9_chat_only_has_no_decision() -> None:
    """ack, tokens, final, done."""
    async with talking(DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.start()
        await socket.until("done")
        assert list(dict.fromkeys(f["type"] for f in socket.frames)) == ["ack", "token", "final", "done"]
        assert socket.of("ack")[0]["models"] == {"chat": "scripted", "tool": None}


async def test_rule_9_tool_only_has_no_text() -> None:
    """ack, toolcall, an empty final, done."""
    async with talking(ScriptedEngine(decision=YES), DEPLOY_MODELS="tool") as talk:
        socket = talk.socket()
        socket.start()
        await socket.until("done")
        assert [f["type"] for f in socket.frames] == ["ack", "toolcall", "final", "done"]
        assert socket.of("final")[0]["normalized_text"] == ""
        assert [call | {"id": ""} for call in socket.of("toolcall")[0]["raw"]] == [
            {"id": "", **call} for call in json.loads(CALL)
        ]
        socket.say("warm_persona", persona_style="savage")
        assert (await socket.until("error"))["error_code"] == "not_deployed"


# --- the rest of a conversation


async def test_a_turn_tells_its_figures() -> None:
    """`ack` and `done` carry what the protocol names, in its units."""
    async with talking() as talk:
        socket = talk.socket()
        socket.start(persona_style="savage", assistant_gender="female", sampling={"seed": 7})
        done = await socket.until("done")
        ack = socket.of("ack")[0]
        assert ack | {"now": ""} == {
            "type": "ack",
            "for": "start",
            "ok": True,
            "session_id": "s",
            "turn": 1,
            "seed": 7,
            "now": "",
            "assistant_gender": "woman",
            "persona_style": "savage",
            "persona_text_override": False,
            "models": {"chat": "scripted", "tool": "scripted"},
        }
        assert set(done["timings"]) == {"queue_ms", "tool_ms", "ttft_ms", "total_ms"}
        assert all(value >= 0 for value in done["timings"].values())
        assert done["usage"]["prompt_tokens"] > 0 and done["usage"]["tool_prompt_tokens"] > 0
        assert done["finish_reason"] == "stop" and "cancelled" not in done


async def test_a_bad_frame_is_an_error_and_an_open_socket() -> None:
    """It names the field; the running turn is not touched."""
    async with talking() as talk:
        socket = talk.socket()
        socket.say_raw("{nonsense")
        socket.say("start", session_id=1, user_utterance="x")
        socket.say("start", session_id="s", user_utterance="x", persona_style="nobody")
        socket.say("start", session_id="s", user_utterance="x", tools=[{"name": "bad name"}])
        socket.say("set_persona", persona_style="savage")
        await socket.until("error", 5)
        errors = socket.of("error")
        assert [e["error_code"] for e in errors] == [
            "bad_message",
            "bad_message",
            "unknown_persona",
            *["bad_message"] * 2,
        ]
        assert errors[2]["session_id"] == "s"
        assert errors[1]["message"] == "Expected str, got int - at $.session_id"
        assert "wholesome" in errors[2]["message"] and "$.persona_style" in errors[2]["message"]
        assert "$.tools[0].name" in errors[3]["message"]
        assert "session_id" in errors[4]["message"]
        socket.start()
        assert (await socket.until("done"))["turn"] == 1, "a refused start must not count as a turn"


async def test_ping_and_end() -> None:
    """`ping` is answered while a turn runs; `end` finishes with 1000 after the running turn's done."""
    async with talking(ScriptedEngine(Script(["x"] * 3, pace=(gate := Gate())))) as talk:
        socket = talk.socket()
        socket.start()
        gate.step()
        await socket.until("token")
        socket.say("ping")
        await socket.until("pong")
        socket.say("end")
        await talk.over(socket)
        assert socket.frames[-1]["type"] == "done" and socket.frames[-1]["cancelled"] is True
        assert socket.closed == 1000


async def test_a_client_that_leaves_frees_the_engine() -> None:
    """A disconnect aborts the generation; what was sent stays in the transcript."""
    engine = ScriptedEngine(Script([" a", " b", " c"], pace=(gate := Gate())))
    async with talking(engine) as talk:
        socket = talk.socket()
        socket.start("hello")
        gate.step(2)
        await socket.until(lambda f: f["type"] == "token" and "b" in f["text"])
        socket.leave()
        await talk.over(socket)
        assert (engine.running, engine.aborted) == (0, 1)
        session = talk.runtime.sessions.open(("default", "s"))
        assert [m.text for m in session.transcript.messages] == ["hello", " a b"]
        assert session.current is None


async def test_a_client_that_does_not_read_is_closed() -> None:
    """Over SEND_QUEUE_BYTES the turn is aborted, the client told, and the socket closed with 4001."""
    engine = ScriptedEngine(Script(["y" * 5000] * 50))
    async with talking(engine, SEND_QUEUE_BYTES=65_536) as talk:
        socket = talk.socket()
        socket.reading.clear()
        socket.start()
        await talk.over(socket)
        assert socket.closed == 4001
        assert socket.frames[-1]["error_code"] == "slow_client"
        assert engine.running == 0


async def test_an_idle_socket_is_closed_but_not_while_a_turn_runs() -> None:
    """4000 after IDLE_TIMEOUT_S without a frame."""
    engine = ScriptedEngine(Script(["x"], pace=(gate := Gate())))
    async with talking(engine, IDLE_TIMEOUT_S=0.05) as talk:
        busy, idle = talk.socket(), talk.socket()
        busy.start()
        await talk.over(idle)
        assert idle.closed == 4000 and busy.closed is None
        gate.step()
        await talk.over(busy)
        assert busy.closed == 4000 and busy.of("final")


async def test_deltas_that_wait_leave_in_one_frame() -> None:
    """While the socket is busy, tokens gather; the text stays the same."""
    async with talking(ScriptedEngine(Script([f" {n}" for n in range(30)], pace=(gate := Gate())))) as talk:
        socket = talk.socket()
        socket.start()
        await socket.until("toolcall")
        socket.reading.clear()
        gate.step(30)
        await settle()
        socket.reading.set()
        await socket.until("done")
        assert len(socket.of("token")) <= 2
        assert socket.of("final")[0]["normalized_text"] == "".join(f" {n}" for n in range(30))


async def test_stream_flush_sends_the_first_token_at_once_and_gathers_the_rest() -> None:
    """STREAM_FLUSH_MS: one frame for the first token, one for what came within the time, then final."""
    async with talking(
        ScriptedEngine(Script(["a", "b", "c", "d"], pace=(gate := Gate()))), STREAM_FLUSH_MS=900
    ) as talk:
        socket = talk.socket()
        socket.start()
        gate.step()
        await socket.until("token")
        gate.step(3)
        await socket.until("done")
        assert [f["text"] for f in socket.of("token")] == ["a", "bcd"]


# --- session, persona, history


async def test_the_session_keeps_what_was_said_and_who_speaks() -> None:
    """Without history_text the session's own transcript is used, on any socket of the same key."""
    engine = ScriptedEngine()
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.start("first words", persona_style="deadpan")
        await socket.until("done")
        other = talk.socket()
        other.start("second words")
        await other.until("done")
        prompt = engine.decode(engine.requests[-1][0])
        assert other.of("ack")[0]["persona_style"] == "deadpan"
        assert "User: first words\nAssistant: Hello there." in prompt
        assert prompt.index("<|persona|>") < prompt.index("<|history|>") < prompt.index("second words")


async def test_history_text_replaces_the_transcript_and_null_clears_it() -> None:
    """Absent keeps, a text replaces, null and an empty text clear."""
    engine = ScriptedEngine()
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        for number, history in enumerate(("User: blue\nAssistant: sky", None, ""), 1):
            socket.start("next", history_text=history)
            await socket.until("done", number)
        prompts = [engine.decode(ids) for ids, _, _ in engine.requests]
        assert "User: blue\nAssistant: sky" in prompts[0]
        assert "<|history|>" not in prompts[1] and "<|history|>" not in prompts[2]


@pytest.mark.parametrize(("heard", "kept"), [(3, [" a", "next"]), (0, ["next"]), (99, [" a b c", "next"])])
async def test_heard_chars_cuts_the_interrupted_reply(heard: int, kept: list[str]) -> None:
    """The stored reply ends where the user stopped listening, for start and for cancel, running or finished."""
    for how in ("cancel", "start", "late cancel"):
        engine = ScriptedEngine(Script([" a", " b", " c"], pace=(gate := Gate())))
        async with talking(engine, DEPLOY_MODELS="chat") as talk:
            socket = talk.socket()
            socket.start("hello")
            gate.step(3)
            if how == "cancel":
                engine.chat.pieces = [" a", " b", " c", " d"]
                await socket.until(lambda f: f["type"] == "token" and f["text"].endswith("c"))
            else:
                await socket.until("done")
            if how != "start":
                socket.say("cancel", heard_chars=heard)
            await socket.until("done")
            socket.start("next", **({"heard_chars": heard} if how == "start" else {}))
            await socket.until("ack", 2)
            session = talk.runtime.sessions.open(("default", "s"))
            assert [m.text.rstrip() for m in session.transcript.messages[1:]] == [k.rstrip() for k in kept[:-1]], how
            gate.step(4)
            await socket.until(lambda f: f["type"] == "done" and f["turn"] == 2)


async def test_set_persona_changes_the_next_turn_and_null_clears() -> None:
    """It acknowledges with what now holds; a text overrides the style until it is cleared."""
    engine = ScriptedEngine()
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.say("set_persona", session_id="s", persona_text="You are a teapot.", assistant_gender="man")
        ack = await socket.until("ack")
        assert (ack["for"], ack["persona_text_override"], ack["assistant_gender"]) == ("set_persona", True, "man")
        socket.start()
        await socket.until("done")
        socket.say("set_persona", persona_text=None)
        assert (await socket.until("ack", 3))["persona_text_override"] is False
        socket.start()
        await socket.until("done", 2)
        first, second = (engine.decode(ids) for ids, _, _ in engine.requests)
        assert "You are a teapot." in first and "teapot" not in second.split("<|history|>")[0]


async def test_sampling_reaches_the_engine() -> None:
    """Every field of `sampling`; what is absent comes from the settings."""
    engine = ScriptedEngine()
    fields = {
        "temperature": 0.3,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.0,
        "max_tokens": 5,
        "seed": 11,
        "stop": ["END"],
    }
    async with talking(engine, DEPLOY_MODELS="chat", CHAT_TOP_K=3) as talk:
        socket = talk.socket()
        for number, sampling in enumerate((fields, {"top_p": 0.9}), 1):
            socket.start(sampling=sampling)
            await socket.until("done", number)
        given_all, given_one = (request[1] for request in engine.requests[-2:])
        assert {name: getattr(given_all, name) for name in fields} == fields | {"stop": ("END",)}
        assert (given_one.top_p, given_one.top_k, given_one.max_tokens) == (0.9, 3, 200)


async def test_warming_makes_a_true_prefix_of_the_next_turn() -> None:
    """What `warmed` counts, the next turn finds in the cache, for persona and for history."""
    history = "\n".join(f"User: question {n}\nAssistant: answer {n}" for n in range(12))
    async with talking(DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.say("warm_persona", persona_style="savage")
        persona = await socket.until("warmed")
        socket.say("warm_history", persona_style="savage", history_text=history)
        both = await socket.until("warmed", 2)
        assert (persona["segment"], both["segment"]) == ("persona_static", "history")
        assert persona["prefix_tokens"] % 16 == 0 and both["bytes"] == len(history)
        assert both["cached_tokens"] >= persona["prefix_tokens"] - 16 > 0
        socket.start(persona_style="savage", history_text=history)
        done = await socket.until("done")
        assert done["usage"]["cached_tokens"] >= both["prefix_tokens"] > persona["prefix_tokens"]


async def test_a_warmed_history_is_tokenized_once_and_its_text_is_not_kept() -> None:
    """The turn that it was warmed for finds its token ids; of those that never come, the last 64 are kept."""
    encoded: list[str] = []

    class Counting(ScriptedCodec):
        async def encode(self, text: str, *, place: Place = "inside") -> list[int]:
            encoded.append(text)
            return await super().encode(text, place=place)

    history = "User: glacier\nAssistant: moraine"
    async with talking(ScriptedEngine(codec=Counting()), DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.say("warm_history", persona_style="savage", history_text=history)
        await socket.until("warmed")
        socket.start(persona_style="savage", history_text=history)
        await socket.until("done")
        assert [text for text in encoded if "glacier" in text or "moraine" in text] == [
            "User: glacier\n",
            "Assistant: moraine\n",
        ]
        assert not talk.runtime.warmed.of("default")
        for number in range(66):
            socket.say("warm_history", persona_style="savage", history_text=f"User: {number}")
            await socket.until("warmed", number + 2)
        assert talk.runtime.warmed.of("default") == [f"User: {number}" for number in range(2, 66)]


async def test_warming_needs_a_persona_and_is_bounded() -> None:
    """`unknown_persona` where none is named; more than four warm-ups at once are refused."""
    engine = ScriptedEngine(Script(pace=(gate := Gate())))
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.say("warm_persona")
        assert (await socket.until("error"))["error_code"] == "unknown_persona"
        for _ in range(5):
            socket.say("warm_persona", persona_style="hype")
        refused = await socket.until("error", 2)
        assert refused["error_code"] == "rate_limited" and refused["retry_after_ms"] > 0
        gate.step(20)
        await socket.until("warmed", 4)


@pytest.mark.parametrize("type", ["start", "set_persona", "warm_persona"])
async def test_a_persona_over_its_limit_is_refused_where_it_arrives(type: str) -> None:
    """`text_too_long` names size and limit; nothing is kept, no turn begins, and the session goes on as it was."""
    async with talking(PERSONA_MAX_TOKENS=20) as talk:
        socket = talk.socket()
        socket.start(persona_text="Short.")
        await socket.until("done")
        fields = {"user_utterance": "hi"} if type == "start" else {}
        socket.say(type, session_id="s", persona_text="word " * 50, **fields)
        error = await socket.until("error")
        assert error["error_code"] == "text_too_long" and "turn" not in error
        assert "limit is 20 (PERSONA_MAX_TOKENS)" in error["message"] and error["session_id"] == "s"
        assert (len(socket.of("ack")), socket.of("warmed")) == (1, [])
        assert talk.runtime.sessions.open(("default", "s")).persona.text == "Short."
        socket.start()
        assert (await socket.until("done", 2))["turn"] == 2


async def test_a_long_utterance_keeps_its_beginning_for_both_models() -> None:
    """USER_UTT_MAX_TOKENS holds for chat, decision and transcript."""
    engine = ScriptedEngine()
    async with talking(engine, USER_UTT_MAX_TOKENS=4) as talk:
        socket = talk.socket()
        socket.start("one two three four five six")
        await socket.until("done")
        assert all("six" not in engine.decode(ids) for ids, _, _ in engine.requests)
        session = talk.runtime.sessions.open(("default", "s"))
        assert session.transcript.messages[0].text == "one two three four"


async def test_tools_stay_until_they_are_cleared() -> None:
    """Absent keeps the session's tools, null goes back to the deployment's, an empty list is a no without asking."""
    engine = ScriptedEngine()
    lamp = {"name": "lamp_on", "description": "Turns the lamp on.", "parameters": {"type": "object", "properties": {}}}
    async with talking(engine, DEPLOY_MODELS="tool") as talk:
        socket = talk.socket()
        for number, fields in enumerate(({"tools": [lamp]}, {}, {"tools": []}, {"tools": None}), 1):
            socket.start(**fields)
            await socket.until("done", number)
        schemas = [str(sampling.json_schema) for _, sampling, _ in engine.requests]
        assert ["lamp_on" in schema for schema in schemas] == [True, True, False]
        assert "play_music" in schemas[2]
        assert (socket.of("toolcall", 3)[0]["status"], socket.of("toolcall", 3)[0]["raw"]) == ("no", [])


# --- what a hostile or unlucky client does


async def test_a_start_just_before_the_client_leaves_does_not_hold_the_session() -> None:
    """Its task may be cancelled before its first step; the next start on the session is answered all the same."""
    async with talking(ScriptedEngine(Script(["x"] * 3, pace=(gate := Gate())))) as talk:
        for _ in range(20):
            leaving = talk.socket()
            leaving.start()
            leaving.leave()
            await talk.over(leaving)
        staying = talk.socket()
        staying.start()
        await staying.until("toolcall")
        gate.step(3)
        await staying.until("done")
        assert talk.runtime.engines.chat.running == 0


async def test_frames_after_end_are_not_acted_on() -> None:
    """`end` is the last word."""
    async with talking() as talk:
        socket = talk.socket()
        socket.say("end")
        socket.start()
        await talk.over(socket)
        assert socket.frames == [] and socket.closed == 1000


async def test_a_turn_that_waited_and_went_leaves_its_place_to_the_one_it_waited_for() -> None:
    """A third socket's turn waits until the engine has let go of the first's, although the second has gone."""
    abort = Gate()
    engine = ScriptedEngine(Script(["x"] * 3, pace=(gate := Gate())), aborting=abort)
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        first, second, third = talk.socket(), talk.socket(), talk.socket()
        first.start("one")
        gate.step()
        await first.until("token")
        second.start("two")
        await settle()
        second.leave()
        await talk.over(second)
        third.start("three")
        await settle()
        assert first.of("done") and engine.running == 1
        assert not third.frames
        abort.step()
        gate.step(3)
        await third.until("done")
        session = talk.runtime.sessions.open(("default", "s"))
        assert [m.text for m in session.transcript.messages if m.speaker == "user"] == ["one", "three"]


async def test_a_tool_engine_that_fails_in_letting_go_begins_no_chat() -> None:
    """The cancel is all that counts: the next turn does not wait for a reply that nobody reads."""

    async def failing() -> None:
        raise EngineFailed("it does not let go")

    decision = Script(["[]"], pace=(gate := Gate()))
    engine = ScriptedEngine(Script(["x"]), decision=decision, aborting=failing)
    async with talking(engine) as talk:
        socket = talk.socket()
        socket.start("one")
        await settle()
        assert engine.running == 1
        socket.say("cancel")
        done = await socket.until("done")
        await settle()
        assert done["cancelled"]
        assert [sampling.json_schema is None for _, sampling, _ in engine.requests[-1:]] == [False]
        gate.step(9)
        socket.start("two")
        assert not (await socket.until("done", 2)).get("cancelled")


async def test_a_turn_that_waited_for_another_session_leaves_its_own_free() -> None:
    """A session whose only turn went before it began can be forgotten, although the turn before it ends later."""
    let_go = asyncio.Event()

    async def aborting() -> None:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()

    engine = ScriptedEngine(Script(["x"] * 3, pace=(gate := Gate())), aborting=aborting)
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.start(session_id="one")
        gate.step()
        await socket.until("token")
        socket.start(session_id="two")
        await settle()
        socket.leave()
        await settle()
        let_go.set()
        await talk.over(socket)
        sessions = [talk.runtime.sessions.open(("default", name)) for name in ("one", "two")]
        assert [session.current for session in sessions] == [None, None]


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"p": {"type": "string", "pattern": "a{99999999999999999999}"}}},
        {"type": "object", "properties": {f"p{n}": {} for n in range(300)}},
        {"type": "object", "properties": {"p": {"type": "string"}}, "required": "p"},
    ],
)
async def test_a_schema_that_would_cost_the_engine_dearly_is_a_bad_message(parameters: dict[str, Any]) -> None:
    """Patterns, hundreds of properties and what is no schema are refused before any engine sees them."""
    async with talking() as talk:
        socket = talk.socket()
        socket.start(tools=[{"name": "t", "parameters": parameters}])
        error = await socket.until("error")
        assert error["error_code"] == "bad_message" and "$.tools[0].parameters" in error["message"]
        assert socket.closed is None


async def test_a_prompt_over_the_context_is_text_too_long() -> None:
    """With both numbers, in the deployment's own limits."""
    limits = {"CHAT_MAX_OUT": 1, "USER_UTT_MAX_TOKENS": 1, "PERSONA_MAX_TOKENS": 1000}
    async with talking(ScriptedEngine(codec=ScriptedCodec(max_model_len=200)), DEPLOY_MODELS="chat", **limits) as talk:
        socket = talk.socket()
        socket.start(persona_text="word " * 300)
        error = await socket.until("error")
        assert error["error_code"] == "text_too_long" and "limit is 199" in error["message"]


async def test_limits_that_leave_no_room_end_the_start() -> None:
    """Not each turn. The line names the context and the settings."""
    with pytest.raises(StartError, match=r"context is 200 tokens: CHAT_MAX_OUT and USER_UTT_MAX_TOKENS leave \d+ "):
        async with talking(ScriptedEngine(codec=ScriptedCodec(max_model_len=200)), DEPLOY_MODELS="chat"):
            pass


async def test_a_persona_that_no_limit_allows_is_refused_at_once() -> None:
    """set_persona does not keep what every later turn would fail on."""
    async with talking(PERSONA_MAX_TOKENS=200) as talk:
        socket = talk.socket()
        socket.say("set_persona", session_id="s", persona_text="x" * 5000)
        assert (await socket.until("error"))["error_code"] == "text_too_long"
        socket.start()
        await socket.until("done")


def test_every_message_of_a_client_has_its_handler() -> None:
    """A new frame is a struct, a handler, a test."""
    assert set(HANDLERS) == set(CLIENT_MESSAGES)
