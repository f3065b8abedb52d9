"""The guide's protocol, spoken literally to the demo model on real vLLM: frames, warm sequence, barge-in."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from conftest import MemorySocket, talking, until

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]
PERSONA = "You are Ann, a warm companion on a voice call. You answer in one short, friendly sentence. " * 10
HISTORY = "User: Hi, I am Bob and I live in Oslo.\nAssistant: Hello Bob! Oslo must be cold today.\n" * 14


async def ended(socket: MemorySocket, count: int) -> dict[str, Any]:
    return await socket.until("done", count)


async def test_the_guides_frames(vllm_engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Section "API": start, toolcall, tokens, final, done; a cancel; a start that supersedes; warm, then hit."""
    variables = {"CHAT_TEMPERATURE": "0", "CHAT_MAX_OUT": "24", "TOOL_HARD_TIMEOUT_MS": "60000"}
    async with talking(vllm_engine, vllm_engine, **variables) as talk:
        socket = talk.socket()
        socket.say("warm_persona", persona_text=PERSONA)
        socket.say("warm_history", history_text=HISTORY)
        warmed = await socket.until("warmed", 2)
        assert (warmed["segment"], warmed["persona_text_override"], warmed["messages"]) == ("history", True, 28)
        socket.say(
            "start",
            session_id="3f2b0a52-1d5e-4c52-9b0a-52f2b1d5e4c5",
            persona_text=PERSONA,
            assistant_gender="woman",
            user_identity="man",
            history_text=HISTORY,
            user_utterance="What is the capital of France?",
        )
        usage = (await ended(socket, 1))["usage"]
        share = usage["cached_tokens"] / usage["prompt_tokens"]
        with capsys.disabled():
            print(f"\nguide's warm sequence: {usage['cached_tokens']} of {usage['prompt_tokens']} cached ({share:.0%})")
        assert share >= 0.9
        assert [frame["type"] for frame in socket.frames if frame["type"] in ("toolcall", "final")] == [
            "toolcall",
            "final",
        ]
        socket.say("start", session_id="user123", user_utterance="Tell me a story.")
        await socket.until(
            lambda frame: frame["type"] == "token" and frame["turn"] == 1 and bool(socket.of("ack", 1)[1:])
        )
        socket.say("start", session_id="user123", user_utterance="new message")
        assert (await ended(socket, 2))["cancelled"] is True
        await socket.until("ack", 3)
        socket.say("cancel")
        assert (await ended(socket, 3))["cancelled"] is True


@pytest.mark.parametrize("format", ["segments", "turns"])
async def test_eight_turns_are_each_warm_by_themselves(
    vllm_engine: Any, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the new words, the template's end and what does not fill a block is cached when the user speaks again."""
    variables = {
        "DEPLOY_MODELS": "chat", "CHAT_TEMPERATURE": "0", "CHAT_MAX_OUT": "40", "CHAT_PROMPT_FORMAT": format,
    }  # fmt: skip
    left, first = [], []
    async with talking(vllm_engine, **variables) as talk:
        socket = talk.socket()
        for turn in range(1, 9):
            socket.start(f"This is turn {turn}: tell me something about the number {turn * 7}.", persona_text=PERSONA)
            done = await ended(socket, turn)
            left.append(done["usage"]["prompt_tokens"] - done["usage"]["cached_tokens"])
            first.append(done["timings"]["ttft_ms"])
            session = talk.runtime.sessions.open(("default", "s"))
            await until(lambda: session.warming is not None and session.warming.done())  # noqa: B023  # awaited here
            session.warming = None
        with capsys.disabled():
            print(f"\n{format}: tokens left to compute {left[1:]}, first token ms {[round(ms) for ms in first[1:]]}")
        assert statistics.median(left[1:]) <= 40 + vllm_engine.codec.block_size
