"""A conversation as client authors mean it: histories, what was heard, tool results, notes, cancels across sockets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import MemorySocket, Talk, check_frames, service, talking, until
from fakes import Gate, Script, ScriptedEngine

from yaptext.dialogue import persona
from yaptext.engine.base import Engines
from yaptext.errors import EngineFailed, StartError
from yaptext.settings.old_names import moved_names
from yaptext.settings.slips import unknown_names

LAMP = {
    "name": "lamp",
    "description": "Switches a lamp.",
    "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}},
}
CALL = '[{"name":"lamp","arguments":{"on":true}}]'


class Deciding(ScriptedEngine):
    """Calls the lamp once for each utterance: not again where the prompt holds what that returned."""

    def stream(self, prompt: Any, sampling: Any, **options: Any) -> Any:
        if sampling.json_schema is not None:
            self.decision = Script(("[]",) if "returned:" in self.decode(prompt) else (CALL,))
        return super().stream(prompt, sampling, **options)


def last_prompt(engine: ScriptedEngine) -> str:
    """Of the last reply."""
    chats = [ids for ids, sampling, priority in engine.requests if sampling.json_schema is None and priority == 1]
    return engine.decode(chats[-1])


async def said(socket: MemorySocket, utterance: str | None = "hi", **fields: Any) -> dict[str, Any]:
    """The last frame of a turn."""
    before = len(socket.of("done")) + len(socket.of("error"))
    socket.say("start", **({"session_id": "s", "user_utterance": utterance} | fields))
    return await socket.until(lambda frame: frame["type"] in ("done", "error"), before + 1)


def transcript(talk: Talk, session_id: str = "s") -> list[tuple[str, str]]:
    session = talk.runtime.sessions.find(("default", session_id))
    return [] if session is None else [(m.speaker, m.text) for m in session.transcript.messages]


# Histories


@pytest.mark.parametrize("format", ["segments", "turns"])
async def test_a_history_is_a_text_or_a_list(format: str) -> None:
    """Both give the same prompt; both at once are a bad message that changes nothing."""
    engine = ScriptedEngine()
    async with talking(engine, DEPLOY_MODELS="chat", CHAT_PROMPT_FORMAT=format) as talk:
        socket = talk.socket()
        items = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        await said(socket, history=items)
        as_list = last_prompt(engine)
        await said(socket, history_text="User: a\nAssistant: b")
        assert last_prompt(engine) == as_list and "b" in as_list
        error = await said(socket, history=items, history_text="User: c")
        assert (error["error_code"], "turn" in error) == ("bad_message", False)
        socket.say("warm_history", history=items)
        assert (await socket.until("warmed"))["messages"] == 2


async def test_what_was_heard_cuts_the_history_that_comes_with_it() -> None:
    """The last message of the assistant in it, not that of the session."""
    async with talking(DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        await said(socket, history_text="User: a\nAssistant: One two three.", heard_text="one TWO")
        assert transcript(talk)[:2] == [("user", "a"), ("assistant", "One two")]


async def test_what_was_heard_of_a_turn_that_was_cut() -> None:
    """By the words that were spoken; the mark says that there was more."""
    engine = ScriptedEngine(Script(["One", " two", " three"], pace=(gate := Gate())))
    async with talking(engine, DEPLOY_MODELS="chat", INTERRUPTED_MARK="[cut]") as talk:
        socket = talk.socket()
        socket.start()
        gate.step(2)
        await socket.until("token", 2)
        socket.say("cancel", heard_text="one")
        assert (await socket.until("done"))["cancelled"]
        assert transcript(talk) == [("user", "hi"), ("assistant", "One [cut]")]


async def test_text_without_labels_is_seen_by_both_models() -> None:
    """Line by line, so that a growing one is cut in steps."""
    engine = ScriptedEngine()
    async with talking(engine) as talk:
        await said(talk.socket(), history_text="It was late.\nThe rain fell.")
        texts = [engine.decode(ids) for ids, _, _ in engine.requests]
        assert all("It was late.\nThe rain fell." in text for text in texts) and len(texts) == 2


# Speaking first, notes, blanks


@pytest.mark.parametrize("history", ["", "User: a\nAssistant: b"])
async def test_the_assistant_speaks_first_or_goes_on(history: str) -> None:
    """Without an utterance: nothing is decided, and nothing of the user is kept."""
    engine = ScriptedEngine()
    async with talking(engine) as talk:
        socket = talk.socket()
        done = await said(socket, None, history_text=history)
        assert done["finish_reason"] == "stop" and socket.of("toolcall")[0]["status"] == "no"
        assert [sampling.json_schema for _, sampling, priority in engine.requests if priority < 2] == [None]
        assert ("Go on" if history else "Begin the conversation") in last_prompt(engine)
        assert transcript(talk)[-1] == ("assistant", "Hello there.")
        assert len(transcript(talk)) == (3 if history else 1)


async def test_a_note_is_for_one_turn() -> None:
    """Just before the utterance, not stored, and not in what later prompts begin with."""
    engine = ScriptedEngine()
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        await said(socket, "Where am I?", note="The user is in Paris.")
        assert "The user is in Paris.\nWhere am I?<|im_end|>" in last_prompt(engine)
        await said(socket, "And now?")
        assert "Paris" not in last_prompt(engine)
        error = await said(socket, note="x" * 10_000)
        assert error["error_code"] == "text_too_long" and "note is 10000 characters" in error["message"]


@pytest.mark.parametrize("allowed", [False, True])
async def test_a_blank_utterance(allowed: bool) -> None:
    """Is a slip, unless it is allowed."""
    async with talking(DEPLOY_MODELS="chat", ALLOW_EMPTY_UTTERANCE=allowed) as talk:
        frame = await said(talk.socket(), " \n")
        assert frame.get("error_code") == (None if allowed else "bad_message")


# Tools


@pytest.mark.parametrize("format", ["segments", "turns"])
@pytest.mark.parametrize("concurrent", [0, 1])
async def test_a_tools_result_is_used_in_the_reply(format: str, concurrent: int) -> None:
    """The turn ends with its calls; their result begins a turn of its own, which decides again and then replies."""
    engine = Deciding()
    variables = {"CHAT_PROMPT_FORMAT": format, "CONCURRENT_MODEL_CALL": concurrent}
    async with talking(engine, **variables) as talk:
        socket = talk.socket()
        done = await said(socket, "Lights!", tools=[LAMP], await_tools=True)
        assert (done["finish_reason"], socket.of("final"), socket.of("token")) == ("tool_calls", [], [])
        (call,) = socket.of("toolcall")[0]["raw"]
        assert (call["name"], call["arguments"]) == ("lamp", {"on": True})
        socket.say("tool_result", session_id="s", turn=1, results=[{"id": call["id"], "content": {"is": "on"}}])
        done = await socket.until("done", 2)
        assert (done["turn"], done["finish_reason"]) == (2, "stop")
        assert socket.of("ack")[1]["for"] == "tool_result"
        assert 'Lights!\n(lamp {"on":true} returned: {"is":"on"})<|im_end|>' in last_prompt(engine)
        assert transcript(talk) == [
            ("user", "Lights!"), ("tool", '(lamp {"on":true} returned: {"is":"on"})'), ("assistant", "Hello there."),
        ]  # fmt: skip
        check_frames([frame for frame in socket.frames if frame.get("turn") == 2])
        await said(socket, "Thanks")
        assert "returned" in last_prompt(engine)


@pytest.mark.parametrize("way", ["setting", "tool"])
async def test_what_else_lets_a_turn_wait_for_results(way: str) -> None:
    """The service's setting, or one tool of the list; without them the reply comes all the same."""
    waits = {"AWAIT_TOOLS": "1"} if way == "setting" else {}
    tool = LAMP if way == "setting" else {**LAMP, "await": True}
    async with talking(Deciding(), **waits) as talk:
        socket = talk.socket()
        assert (await said(socket, tools=[tool]))["finish_reason"] == "tool_calls"
        assert (await said(socket, tools=[LAMP], await_tools=False))["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        ({"turn": 7}, "$.turn"),
        ({"results": [{"id": "call_x", "content": ""}]}, "$.results[0].id"),
        ({"results": []}, "$.results"),
    ],
)
async def test_a_result_that_fits_no_call_is_a_bad_message(frame: dict[str, Any], field: str) -> None:
    """Nothing changes: the right one is still taken."""
    async with talking(Deciding()) as talk:
        socket = talk.socket()
        await said(socket, tools=[LAMP], await_tools=True)
        right = {
            "session_id": "s",
            "turn": 1,
            "results": [{"id": socket.of("toolcall")[0]["raw"][0]["id"], "content": ""}],
        }
        socket.say("tool_result", **(right | frame))
        error = await socket.until("error")
        assert error["error_code"] == "bad_message" and error["message"].endswith(field)
        socket.say("tool_result", **right)
        assert (await socket.until("done", 2))["finish_reason"] == "stop"
        socket.say("tool_result", **right)
        assert "waits for no tool results" in (await socket.until("error", 2))["message"]


async def test_a_result_that_is_refused_leaves_no_session() -> None:
    """Nor does a `start` that is: nobody fills the memory with what was never said."""
    async with talking() as talk:
        socket = talk.socket()
        socket.say("tool_result", session_id="new", turn=1, results=[])
        assert "waits for no tool results" in (await socket.until("error"))["message"]
        assert (await said(socket, tools=[{"name": "no name"}]))["type"] == "error"
        assert len(talk.runtime.sessions) == 0


async def test_a_long_result_keeps_its_beginning() -> None:
    """Within TOOL_RESULT_MAX_TOKENS; one that no count of tokens could bring there is refused, by name."""
    engine = Deciding()
    async with talking(engine, TOOL_RESULT_MAX_TOKENS="4") as talk:
        socket = talk.socket()
        await said(socket, tools=[LAMP], await_tools=True)
        call = socket.of("toolcall")[0]["raw"][0]["id"]
        answer = {"session_id": "s", "turn": 1, "results": [{"id": call, "content": "x" * 65}]}
        socket.say("tool_result", **answer)
        assert "is 65 characters; limit is 64 - at $.results" in (await socket.until("error"))["message"]
        socket.say("tool_result", **(answer | {"results": [{"id": call, "content": "on and on and on and off"}]}))
        await socket.until("done", 2)
        assert "off" not in last_prompt(engine) and "returned: on" in last_prompt(engine)


async def test_a_call_that_nobody_answers_is_left() -> None:
    """A new start goes on; the history holds what the user said."""
    engine = Deciding()
    async with talking(engine) as talk:
        socket = talk.socket()
        await said(socket, "Lights!", tools=[LAMP], await_tools=True)
        await said(socket, "Never mind", await_tools=False)
        assert [text for speaker, text in transcript(talk) if speaker == "user"] == ["Lights!", "Never mind"]


class Insisting(ScriptedEngine):
    """Calls the lamp again and again, each time another way, or always the same."""

    changes = True

    def stream(self, prompt: Any, sampling: Any, **options: Any) -> Any:
        if sampling.json_schema is not None:
            on = len(self.requests) % 2 == 0 or not self.changes
            self.decision = Script((json.dumps([{"name": "lamp", "arguments": {"on": on}}], separators=(",", ":")),))
        return super().stream(prompt, sampling, **options)


async def test_a_call_whose_result_is_there_is_not_made_again() -> None:
    """A small model may ask for the same once more: then the reply comes."""
    engine = Insisting()
    engine.changes = False
    async with talking(engine) as talk:
        socket = talk.socket()
        await said(socket, tools=[LAMP], await_tools=True)
        results = [{"id": socket.of("toolcall")[0]["raw"][0]["id"], "content": "on"}]
        socket.say("tool_result", session_id="s", turn=1, results=results)
        assert (await socket.until("done", 2))["finish_reason"] == "stop"
        assert socket.of("toolcall")[1]["status"] == "no"


async def test_calls_in_a_chain_end() -> None:
    """After MAX_TOOL_ROUNDS decisions none is asked any more."""
    engine = Insisting()
    async with talking(engine, MAX_TOOL_ROUNDS="2") as talk:
        socket = talk.socket()
        done = await said(socket, tools=[LAMP], await_tools=True)
        for turn in (1, 2):
            assert done["finish_reason"] == "tool_calls"
            call = socket.of("toolcall", turn)[0]["raw"][0]["id"]
            socket.say("tool_result", session_id="s", turn=turn, results=[{"id": call, "content": "on"}])
            done = await socket.until("done", turn + 1)
        assert done["finish_reason"] == "stop"


# Cancels and order


async def test_a_cancel_reaches_its_session_on_any_socket() -> None:
    """The turn's own socket gets its done; the other one gets one with the turn's number, or 0 if nothing ran."""
    engine = ScriptedEngine(Script(["x"] * 9, pace=(gate := Gate())))
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        speaks, stops = talk.socket(), talk.socket()
        speaks.start()
        gate.step()
        await speaks.until("token")
        stops.say("cancel")
        assert (await stops.until("done"))["turn"] == 0
        assert not speaks.of("done")
        stops.say("cancel", session_id="s", heard_chars=1)
        assert (await speaks.until("done")) | {"x": 0} != {} and speaks.of("done")[0]["cancelled"]
        done = await stops.until("done", 2)
        assert (done["turn"], done["session_id"], done["cancelled"]) == (1, "s", True)
        stops.say("cancel", session_id="s")
        assert (await stops.until("done", 3))["turn"] == 0
        assert talk.socket("other") and transcript(talk) == [("user", "hi"), ("assistant", "x")]


async def test_of_a_burst_the_newest_wins() -> None:
    """Twenty starts at once, while the engine is slow to let go: all but the last are cancelled, none is refused."""
    abort = Gate()
    engine = ScriptedEngine(Script(["x"] * 2, pace=(gate := Gate())), aborting=abort)
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        socket.start("first")
        gate.step()
        await socket.until("token")
        for number in range(20):
            socket.start(f"more {number}")
        await socket.until("done", 20)
        assert all(frame["cancelled"] for frame in socket.of("done")) and not socket.of("error")
        abort.step(20)
        gate.step(2)
        last = await socket.until("done", 21)
        assert (last["turn"], last["finish_reason"]) == (21, "stop")
        check_frames(socket.frames, decides=False)


async def test_frames_of_a_turn_name_their_session() -> None:
    """So that a client with several can sort them."""
    engine = ScriptedEngine(Script(error=EngineFailed("no")))
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        error = await said(socket, session_id="mine")
        assert (error["type"], error["session_id"], error["turn"]) == ("error", "mine", 1)
        assert not socket.of("final") and not socket.of("done")


# Limits of a reply


async def test_a_reply_that_takes_too_long_ends_with_what_it_has() -> None:
    """CHAT_TIMEOUT_S; the engine is let go."""
    engine = ScriptedEngine(Script(["One", " two"], pace=(gate := Gate())))
    async with talking(engine, DEPLOY_MODELS="chat", CHAT_TIMEOUT_S="0.2") as talk:
        socket = talk.socket()
        gate.step()
        done = await said(socket)
        assert (done["finish_reason"], socket.of("final")[0]["normalized_text"]) == ("timeout", "One")
        assert engine.running == 0 and transcript(talk)[-1] == ("assistant", "One")


@pytest.mark.parametrize(
    ("pieces", "reply"),
    [
        (["One", " two", ".", " Three", "."], "One two."),
        (["It", " is", " 3", ".", "14", " metres", ".", " Next"], "It is 3.14 metres."),
        (["Ask", " Dr", ".", " Who", "!", " Then"], "Ask Dr. Who!"),
        (["\u4e00\u4e8c", "\u4e09\u3002", "\u56db"], "\u4e00\u4e8c\u4e09\u3002"),
        (["No", " end", " in", " sight"], "No end in sight"),
    ],
)
async def test_after_the_soft_limit_a_reply_ends_with_its_sentence(pieces: list[str], reply: str) -> None:
    """In any script; a point in a number or an abbreviation ends none."""
    async with talking(ScriptedEngine(Script(pieces)), DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        done = await said(socket, sampling={"soft_max_tokens": 2})
        assert socket.of("final")[0]["normalized_text"] == reply
        assert done["finish_reason"] == ("soft_limit" if reply != "".join(pieces) else "stop")


async def test_speakable_text_is_sent_and_the_models_own_is_kept() -> None:
    """`final` is what was sent; `heard_chars` counts in that, and cuts the model's words where they stand."""
    engine = ScriptedEngine(Script(["**Hello**", " there", " \U0001f642", "!", " How", " *are*", " you?"]))
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        await said(socket, speakable=True)
        assert socket.of("final")[0]["normalized_text"] == "Hello there! How are you?"
        assert transcript(talk)[-1] == ("assistant", "**Hello** there \U0001f642! How *are* you?")
        socket.say("cancel", heard_chars=len("Hello there! How are"))
        await socket.until("done", 2)
        assert transcript(talk)[-1] == ("assistant", "**Hello** there \U0001f642! How *are*")
        check_frames(socket.frames, decides=False)


# What a client sees of its session


async def test_a_session_is_shown_and_forgotten(tmp_path: Path) -> None:
    """Everywhere: the running turn ends, and nothing of it can be read in the file."""
    engine = ScriptedEngine(Script(["sherbet", " lemon"], pace=(gate := Gate())))
    variables = {"DEPLOY_MODELS": "chat", "SESSION_STORE": f"sqlite:{tmp_path / 'sessions'}"}
    async with talking(engine, **variables) as talk:
        socket = talk.socket()
        gate.step(2)
        await said(socket, "marmalade", persona_text="You are Ada.", assistant_gender="F")
        socket.say("get_session", session_id="s")
        shown = await socket.until("session")
        assert shown == {
            "type": "session", "session_id": "s", "known": True, "turns": 1, "assistant_gender": "woman",
            "user_identity": None, "persona_style": None, "persona_text": "You are Ada.", "tools": None,
            "history": [{"role": "user", "content": "marmalade"}, {"role": "assistant", "content": "sherbet lemon"}],
        }  # fmt: skip
        socket.say("warm_history", session_id="s", history_text="User: treacle")
        gate.step()
        await socket.until("warmed")
        await asyncio.to_thread(_wait_for, tmp_path / "sessions", b"marmalade")
        socket.start("toffee")
        await socket.until("ack", 2)
        socket.say("forget", session_id="s")
        assert await socket.until("forgotten") == {"type": "forgotten", "session_id": "s", "known": True}
        assert socket.of("done")[-1]["cancelled"]
        written = await asyncio.to_thread(_bytes_of, tmp_path)
        assert not any(word in written for word in (b"marmalade", b"sherbet", b"toffee", b"Ada"))
        assert talk.runtime.warmed.of("default") == [] and len(talk.runtime.sessions) == 0
        socket.say("get_session", session_id="s")
        assert (await socket.until("session", 2))["known"] is False
        socket.say("forget", session_id="s")
        assert (await socket.until("forgotten", 2))["known"] is False
        await asyncio.to_thread(talk.runtime.sessions.close)


async def test_what_follows_a_forget_is_another_session(tmp_path: Path) -> None:
    """Sent in one breath with it, or as the last frame of a client that goes; what was warmed before the first turn is
    forgotten too."""
    variables = {"DEPLOY_MODELS": "chat", "SESSION_STORE": f"sqlite:{tmp_path / 'sessions'}"}
    async with talking(**variables) as talk:
        socket = talk.socket()
        socket.say("warm_history", session_id="s", history_text="User: treacle")
        await socket.until("warmed")
        socket.say("forget", session_id="s")
        assert (await socket.until("forgotten"))["known"] is True and talk.runtime.warmed.of("default") == []
        await said(socket, "marmalade")
        socket.say("forget", session_id="s")
        await said(socket, "toffee")
        await socket.until("forgotten", 2)
        assert [text for speaker, text in transcript(talk) if speaker == "user"] == ["toffee"]
        await asyncio.to_thread(_wait_for, tmp_path / "sessions", b"toffee")
        socket.say("forget", session_id="s")
        socket.leave()
        await talk.over(socket)
        other = talk.socket()
        await said(other, "nougat", session_id="t")
        await asyncio.to_thread(_wait_for, tmp_path / "sessions", b"nougat")
        written = await asyncio.to_thread(_bytes_of, tmp_path)
        assert b"toffee" not in written and b"marmalade" not in written
        await asyncio.to_thread(talk.runtime.sessions.close)


def _bytes_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


def _wait_for(file: Path, word: bytes) -> None:
    import time

    until = time.monotonic() + 20
    while word not in _bytes_of(file.parent):
        assert time.monotonic() < until
        time.sleep(0.05)


async def test_what_a_start_does_not_know_is_in_its_ack() -> None:
    """Fields of older clients are read; what remains is told, so that no slip is silent."""
    async with talking() as talk:
        socket = talk.socket()
        socket.say_raw(json.dumps({"type": "start", "user_id": "s", "message": "hi", "gender": "f", "mood": 1}))
        ack = await socket.until("ack")
        assert (ack["session_id"], ack["assistant_gender"], ack["ignored"]) == ("s", "woman", ["mood"])


# Warm


async def test_the_guides_warm_sequence_hits() -> None:
    """warm_persona, then warm_history without a persona, then a start with both: nearly all is cached."""
    engine = ScriptedEngine()
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        persona = {"persona_text": "You are Ada, a patient companion. " * 10}
        history = "User: hello there\nAssistant: hello to you\n" * 30
        socket.say("warm_persona", **persona)
        socket.say("warm_history", history_text=history)
        warmed = await socket.until("warmed", 2)
        assert (warmed["persona_text_override"], warmed["messages"]) == (True, 60)
        usage = (await said(socket, history_text=history, **persona))["usage"]
        assert usage["cached_tokens"] >= 0.9 * usage["prompt_tokens"]


async def test_a_style_is_warmed_even_if_the_session_has_a_text() -> None:
    """`warmed` says which persona it was."""
    async with talking(DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        await said(socket, persona_text="You are Ada.")
        socket.say("warm_persona", session_id="s", persona_style="Savage")
        warmed = await socket.until("warmed")
        assert (warmed["persona_style"], warmed["persona_text_override"]) == ("savage", False)


@pytest.mark.parametrize("format", ["segments", "turns"])
async def test_the_next_turn_is_warm_by_itself(format: str) -> None:
    """While the user listens the last exchange is computed, so that only the new words are left to compute."""
    engine = ScriptedEngine(Script(["word "] * 60, finish="stop"))
    async with talking(engine, DEPLOY_MODELS="chat", CHAT_PROMPT_FORMAT=format) as talk:
        socket = talk.socket()
        for turn in range(1, 5):
            usage = (await said(socket, f"This is what I say in turn {turn}."))["usage"]
            if turn > 1:
                assert usage["prompt_tokens"] - usage["cached_tokens"] <= 48
            session = talk.runtime.sessions.open(("default", "s"))
            await until(lambda: session.warming is not None and session.warming.done())  # noqa: B023  # awaited here
            session.warming = None


async def test_a_start_ends_the_warming_for_it() -> None:
    """Nothing runs beside a turn that it was meant for."""
    engine = ScriptedEngine(Script(["a"], pace=(gate := Gate())))
    async with talking(engine, DEPLOY_MODELS="chat") as talk:
        socket = talk.socket()
        gate.step()
        await said(socket)
        await until(lambda: bool(engine.running))
        socket.start("again")
        await socket.until("ack", 2)
        gate.step()
        await socket.until("done", 2)
        assert engine.aborted == 1


async def test_tokens_can_be_made_likelier_or_not() -> None:
    """CHAT_LOGIT_BIAS by text; what is not one token ends the start."""
    engine = ScriptedEngine()
    async with talking(
        engine, DEPLOY_MODELS="chat", CHAT_LOGIT_BIAS={" delve": -5}, CHAT_PRESENCE_PENALTY="0.5"
    ) as talk:
        await said(talk.socket())
        (token,) = await engine.codec.encode(" delve")
        sampling = engine.requests[0][1]
        assert (sampling.logit_bias, sampling.presence_penalty) == (((token, -5.0),), 0.5)
    with pytest.raises(StartError, match=r"CHAT_LOGIT_BIAS: 'two words' is 2 tokens"):
        async with talking(DEPLOY_MODELS="chat", CHAT_LOGIT_BIAS={"two words": 1}):
            pass


async def test_styles_of_the_operator_are_read_again_on_a_hangup(tmp_path: Path) -> None:
    """As the key file is; `/status` lists them, and a wrong file changes nothing."""
    import os
    import signal

    import httpx

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.toml").write_text(text)

    async def listed(has: str, http: str) -> list[str]:
        async with httpx.AsyncClient(headers={"X-API-Key": "yap_token"}) as client, asyncio.timeout(20):
            while has not in (styles := (await client.get(f"{http}/status")).json()["personas"]):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return styles

    write("pirate", 'title = "Pirate"\ntext = "You are a pirate."')
    engine = ScriptedEngine()
    try:
        async with service(Engines(chat=engine, tool=engine), PERSONAS_DIR=tmp_path) as running:
            assert "savage" in await listed("pirate", running.http)
            write("ghost", 'title = "Ghost"\ntext = "You are a ghost."')
            os.kill(os.getpid(), signal.SIGHUP)
            await listed("ghost", running.http)
            write("broken", "title")
            with structlog.testing.capture_logs() as lines:
                os.kill(os.getpid(), signal.SIGHUP)
                await until(lambda: any(line["event"] == "personas.refused" for line in lines))
            assert "ghost" in await listed("pirate", running.http)
    finally:
        persona.use_folder(None)


@pytest.mark.parametrize(
    ("environ", "note"),
    [
        ({"CHAT_TEMPRATURE": "1"}, "CHAT_TEMPRATURE is not known; do you mean CHAT_TEMPERATURE?"),
        ({"MAX_CONCURENT_CONNECTIONS": "1"}, "do you mean MAX_CONCURRENT_CONNECTIONS?"),
        ({"CHAT_WHATEVER": "1"}, "CHAT_WHATEVER is not known"),
        ({"WARMUP_ON_START": "1"}, "WARMUP_ON_START has no meaning here"),
    ],
)
def test_a_slip_in_a_name_is_told(environ: dict[str, str], note: str) -> None:
    """It would otherwise change nothing and say nothing."""
    assert any(note in found for found in unknown_names(environ))


def test_what_is_not_ours_is_none_of_our_business() -> None:
    """Nor are names that are known, of today or of earlier stacks."""
    names = (
        "PATH",
        "SESSION_MANAGER",
        "KEYBOARD",
        "HOSTNAME",
        "CHAT_MODEL",
        "AWQ_NSAMPLES",
        "GEN_TIMEOUT_S",
        "TOOL_TIMEOUT_S",
    )
    assert unknown_names(dict.fromkeys(names, "x")) == []


@pytest.mark.parametrize(
    ("old", "value", "new", "is_now"),
    [
        ("GEN_TIMEOUT_S", "30", "CHAT_TIMEOUT_S", "30"),
        ("GEN_TIMEOUT_S", "-1", "CHAT_TIMEOUT_S", "0"),
        ("TOOL_TIMEOUT_S", "2.5", "TOOL_HARD_TIMEOUT_MS", "2500"),
        ("TOOL_TIMEOUT_S", "-1", "TOOL_HARD_TIMEOUT_MS", "86400000"),
        ("CHAT_MAX_LEN", "4096", "CHAT_MAX_MODEL_LEN", "4096"),
        ("AWQ_SEQLEN", "512", "AWQ_CALIBRATION_TOKENS", "512"),
        ("HUGGINGFACE_TOKEN", "hf_x", "HF_TOKEN", "hf_x"),
        ("QUANTIZATION", "gptq_marlin", "QUANTIZATION", "gptq"),
    ],
)
def test_names_of_earlier_stacks_are_read(old: str, value: str, new: str, is_now: str) -> None:
    """With a note that says what they are now."""
    moved = moved_names({old: value})
    assert moved.values[new] == is_now and any(old in note for note in moved.notes)
