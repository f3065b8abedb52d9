"""tools/bench: each scenario against the service, and what its conversation makes of frames that break the rules."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import websockets
from conftest import service
from fakes import Script, ScriptedEngine

from yaptext.bench.campaign import Campaign
from yaptext.bench.conversation import Full
from yaptext.bench.plan import Plan, Sampling
from yaptext.bench.prompts import Prompts, Story
from yaptext.bench.run import Run
from yaptext.bench.screen import Lines
from yaptext.bench.service import Service
from yaptext.client.errors import Refused
from yaptext.engine.base import Engines
from yaptext.errors import EngineFailed


class Quiet(Lines):
    def __init__(self) -> None:
        self.ended: list[Run] = []

    def begin(self, run: Run, number: int, of: int) -> None:
        pass

    def end(self, run: Run) -> None:
        self.ended.append(run)


def talkative(pieces: int = 8, pace_s: float = 0.002) -> ScriptedEngine:
    async def pace() -> None:
        await asyncio.sleep(pace_s)

    return ScriptedEngine(chat=Script([" word"] * pieces, pace))


async def measure(
    scenario: str,
    engine: ScriptedEngine | None = None,
    plan: dict[str, Any] | None = None,
    then: Script | None = None,
    **variables: Any,
) -> dict[str, Any]:
    """The result of one scenario with 3 users and 2 turns each, unless told otherwise. `then` is what the engine says
    once the service has started."""
    engine = engine or talkative()
    given: dict[str, Any] = {"sessions": (3,), "turns": 2, "rounds": 1, "persona_tokens": 60, "history_tokens": 100}
    chosen = Plan((scenario,), **given | {"sampling": Sampling(8), "duration_s": 60.0, "gap_s": 0.05} | (plan or {}))
    async with service(Engines(chat=engine, tool=engine), **variables) as running:
        engine.chat = then or engine.chat
        campaign = Campaign(chosen, [Service(running.ws, "yap_token", chosen.sampling)], Quiet())
        async with asyncio.timeout(120):
            await campaign.measure()
    assert engine.running == 0
    (result,) = campaign.report()["results"]
    assert not result["counts"]["strays"]
    return dict(result)


def count(result: dict[str, Any], figure: str) -> int:
    return int(result["figures"].get(figure, {}).get("count", 0))


async def test_cold_turns_share_nothing() -> None:
    """Persona and history differ from the first token on, in every turn: at most the template's opening is cached."""
    result = await measure("cold")
    assert result["figures"]["cached_ratio"]["value"] < 0.1
    for figure in ("ack_ms", "decision_ms", "ttft_ms", "first_sentence_ms", "total_ms"):
        assert count(result, figure) == 6, figure
    assert count(result, "inter_token_ms") == 6 * 7 and result["errors"] == {}
    assert result["figures"]["completion_tokens"]["p50"] == 8


async def test_warm_turns_find_their_prefix() -> None:
    """Each of them, since the history is told anew and does not grow."""
    result = await measure("warm")
    assert result["figures"]["cached_ratio"]["value"] > 0.8 and count(result, "warm_ms") == 3


async def test_users_share_a_persona_when_told_so() -> None:
    """Then the first of them computes it for all."""
    alone = await measure("cold", plan={"persona_tokens": 200, "history_tokens": 20})
    shared = await measure("cold", plan={"persona_tokens": 200, "history_tokens": 20, "shared_persona": True})
    assert alone["figures"]["cached_ratio"]["value"] < 0.1
    assert shared["figures"]["cached_ratio"]["value"] > 0.4


async def test_a_conversation_has_a_session_for_each_user() -> None:
    """From the second turn on its prefix is cached, and the transcript that the server holds is a part of it."""
    engine = talkative()
    result = await measure("conversation", engine)
    assert count(result, "ttft_ms") == 6 and result["figures"]["cached_ratio"]["value"] > 0.3
    chats = [engine.decode(prompt) for prompt, sampling, _ in engine.requests if sampling.max_tokens == 8]
    assert sum("Assistant: word word" in chat for chat in chats) == 3


async def test_barging_in_is_measured_both_ways() -> None:
    """By a cancel and by a new start, and then all at once until the engine has nothing to do."""
    result = await measure("barge-in", talkative(200, 0.005), {"turns": 4, "sampling": Sampling(200)})
    assert count(result, "cancel_to_silence_ms") == 9 and count(result, "start_to_silence_ms") == 6
    assert count(result, "server_cancel_ms") == 15 and count(result, "cancel_to_freed_ms") == 3
    assert count(result, "freed_cancel_to_silence_ms") == 9 and result["notes"] == [] and result["errors"] == {}


async def test_a_storm_comes_back_into_its_sessions() -> None:
    """All sockets, every time; the turns before it are not mixed in."""
    result = await measure("reconnect")
    assert count(result, "back_ms") == 6 == count(result, "ttft_ms") and count(result, "before_ttft_ms") == 3
    assert count(result, "connect_ms") == 9 and result["errors"] == {}


async def test_a_ramp_finds_the_limit() -> None:
    """It counts refusals and the wait that they ask for, and a place given up is given again."""
    result = await measure("ramp", plan={"ramp_max": 50}, MAX_CONCURRENT_CONNECTIONS=4)
    assert result["sessions"] == 50 and result["counts"]["admitted"] == 4 and result["counts"]["refusals"] == 3
    assert result["errors"] == {"server_at_capacity": 3}
    assert 1500 <= result["figures"]["retry_after_ms"]["p50"] <= 2500
    assert count(result, "readmitted_ms") == 1 and count(result, "ttft_ms") == 4


async def test_idle_turns_stand_beside_busy_ones() -> None:
    """The gap is before each of them."""
    result = await measure("idle")
    assert count(result, "ttft_ms") == 6 and count(result, "busy_ttft_ms") == 6 and result["seconds"][0] > 0.1


async def test_a_slow_reader_is_one_more_and_is_not_counted() -> None:
    """Others' turns before and beside it; what became of it is told."""
    result = await measure("slow-reader")
    assert count(result, "calm_ttft_ms") == 6 == count(result, "ttft_ms")
    assert result["notes"] == ["the slow reader was not closed: its buffers took all"]


async def test_a_slow_reader_that_is_closed_is_told() -> None:
    """The service does that where more waits for it than may."""
    big = ScriptedEngine(chat=Script(["word " * 100_000] * 8))
    result = await measure("slow-reader", big, {"sessions": (1,), "turns": 6}, SEND_QUEUE_BYTES=65_536)
    assert result["notes"][0].startswith("the slow reader was closed with ")


async def test_users_without_a_place_are_counted_and_the_others_go_on() -> None:
    """More sessions than the service takes is no reason to stop."""
    result = await measure("warm", MAX_CONCURRENT_CONNECTIONS=2)
    assert result["counts"]["refusals"] == 1 and count(result, "ttft_ms") == 4


async def test_engine_failures_are_counted_by_code() -> None:
    """The socket lives on, and so does the user."""
    result = await measure("conversation", then=Script(["a"], error=EngineFailed("no")))
    assert result["errors"] == {"engine_failed": 6} and count(result, "total_ms") == 0


async def test_no_turn_begins_after_its_time() -> None:
    """The duration bounds a run, one turn is always taken."""
    result = await measure("conversation", talkative(8, 0.01), {"turns": 1000, "duration_s": 0.2})
    assert 3 <= result["counts"]["turns"] <= 15


async def test_a_turn_that_hangs_is_given_up() -> None:
    """It counts as an error of that user, who leaves."""
    result = await measure("conversation", plan={"turn_timeout_s": 0.2}, then=talkative(8, 60).chat)
    assert result["errors"] == {"timeout": 3, "disconnected": 3}


async def test_rounds_and_targets_alternate() -> None:
    """Who was first in one round is second in the next."""
    engine = talkative()
    plan = Plan(("warm",), sessions=(1,), turns=1, rounds=2, persona_tokens=20, history_tokens=20)
    watching = Quiet()
    async with service(Engines(chat=engine, tool=engine)) as running:
        one, other = (Service(running.ws, "yap_token", plan.sampling) for _ in range(2))
        other.name = "other"
        campaign = Campaign(plan, [one, other], watching)
        await campaign.measure()
    assert [run.target.name for run in watching.ended] == ["yap-text", "other", "other", "yap-text"]
    assert [len(result["seconds"]) for result in campaign.report()["results"]] == [2, 2]


def test_prompts_are_the_same_for_the_same_seed() -> None:
    """And of about the size that was asked for; users differ from the first word on."""
    first, second = (Prompts(7, "n", persona_tokens=300, history_tokens=700) for _ in range(2))
    assert first.story(3, 1) == second.story(3, 1) != first.story(3, 2)
    assert [first.utterance(3, turn) for turn in range(50)] == [second.utterance(3, turn) for turn in range(50)]
    assert 300 / 1.3 <= len(first.story(0).persona.split()) <= 300 / 1.3 + 20
    assert 700 / 1.3 <= len(first.story(0).history.split()) <= 700 / 1.3 + 40
    assert first.story(0).persona.split()[2] != first.story(1).persona.split()[2]
    other = Prompts(7, "another", persona_tokens=300, history_tokens=700)
    assert other.story(3, 1).persona.split()[1] != first.story(3, 1).persona.split()[1]


# --- frames that no service should send


def frames(*sent: dict[str, Any]) -> list[dict[str, Any]]:
    done = {"type": "done", "turn": 1, "usage": {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}}
    return [{"type": "ack", "for": "start", "turn": 1}, *sent, done]


TOKEN, FINAL = {"type": "token", "text": "a", "turn": 1}, {"type": "final", "normalized_text": "a", "turn": 1}


@asynccontextmanager
async def answering(sent: list[dict[str, Any]], code: int | None = None) -> AsyncIterator[Service]:
    """A server that answers every `start` with these frames, and then closes where a code is given."""

    async def talk(socket: websockets.ServerConnection) -> None:
        async for message in socket:
            kind = json.loads(message)["type"]
            if kind == "ping":
                await socket.send('{"type": "pong"}')
            elif kind == "start":
                for frame in sent:
                    await socket.send(json.dumps(frame))
                if code is not None:
                    await socket.close(code)
            elif kind == "end":
                await socket.close()

    async with websockets.serve(talk, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
        yield Service(url, "k", Sampling(8))


@pytest.mark.parametrize(
    ("sent", "strays"),
    [
        (frames(TOKEN, FINAL), 0),
        (frames(TOKEN, FINAL | {"normalized_text": "b"}), 1),
        (frames(TOKEN, TOKEN | {"turn": 2}, FINAL), 1),
        ([*frames(TOKEN, FINAL), TOKEN, TOKEN], 2),
        (frames(TOKEN, {"type": "ack", "for": "start", "turn": 2}, FINAL), 1),
    ],
)
async def test_frames_against_the_rules_are_counted(sent: list[dict[str, Any]], strays: int) -> None:
    """A final that is not its tokens, a frame of another turn, a frame after the end."""
    async with answering(sent) as target:
        conversation = target.conversation()
        await conversation.open()
        conversation.meet("s", Story("p", "User: h"))
        turn = await conversation.begin("hi")
        await turn.over.wait()
        await conversation.close()  # its answer comes after all that was sent
        assert turn.outcome == "done" and conversation.strays == strays


async def test_a_socket_that_closes_ends_its_turn() -> None:
    """With the code that it was closed with; what begins afterwards ends at once."""
    async with answering(frames(TOKEN)[:-1], code=1011) as target:
        conversation = target.conversation()
        await conversation.open()
        conversation.meet("s", Story("p", "User: h"))
        turn = await conversation.begin("hi")
        await turn.over.wait()
        following = await conversation.begin("hi")
        assert (turn.error, following.error, conversation.closed_code) == ("closed_1011", "closed_1011", 1011)
        with pytest.raises(Refused, match="closed"):
            await conversation.warm()
        await conversation.close()


async def test_errors_find_the_turn_they_belong_to() -> None:
    """One that names no turn is of the youngest turn without an ack."""
    error = {"type": "error", "error_code": "bad_message", "message": "no"}
    async with answering([error]) as target:
        conversation = target.conversation()
        await conversation.open()
        conversation.meet("s", Story("p", "User: h"))
        turn = await conversation.begin("hi")
        await turn.over.wait()
        assert (turn.outcome, turn.error) == ("failed", "bad_message")
        await conversation.close()


async def test_a_refusal_carries_its_wait() -> None:
    """It comes after the handshake, in the place of the answer to the first ping."""
    async with service(Engines(chat=talkative(), tool=None), DEPLOY_MODELS="chat", MAX_CONCURRENT_CONNECTIONS=1) as at:
        target = Service(at.ws, "yap_token", Sampling(8))
        first, second = target.conversation(), target.conversation()
        await first.open()
        with pytest.raises(Full) as refused:
            await second.open()
        assert refused.value.code == "server_at_capacity" and 1500 <= (refused.value.retry_after_ms or 0) <= 2500
        await first.close()
        with pytest.raises(Refused, match="authentication_failed"):
            await Service(at.ws, "wrong", Sampling(8)).conversation().open()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/ws", "ws://127.0.0.1:9/ws", "nonsense"])
async def test_an_address_without_a_service_is_named(url: str) -> None:
    """One line, whatever is wrong with it."""
    with pytest.raises(Refused, match=f"^cannot connect to {url}: "):
        await Service(url, "k", Sampling(8)).conversation().open()
