"""server/openai: what clients of OpenAI's responses send over HTTP and on a socket, and what they are answered."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from conftest import Running, until
from fakes import Gate, Script
from server.test_chat_completions import CALL, WEATHER, door, prompts, tick

from yaptext.errors import EngineFailed

pytestmark = pytest.mark.asyncio(loop_scope="session")
FLAT = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
ENDS = ("response.completed", "response.incomplete", "response.failed", "error")
Event = dict[str, Any]


async def ask(client: httpx.AsyncClient, given: Any = "hi", **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/responses", json={"model": "chat", "input": given, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def stream(client: httpx.AsyncClient, given: Any = "hi", **fields: Any) -> list[Event]:
    answer = await client.post("/v1/responses", json={"model": "chat", "input": given, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = []
    for each in answer.text.split("\n\n")[:-1]:
        name, data = each.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


class Socket:
    """A client of the socket."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket

    async def create(self, given: Any = "hi", **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": "response.create", "model": "chat", "input": given, **fields}))

    async def cancel(self, response_id: str | None = None) -> None:
        await self.socket.send(json.dumps({"type": "response.cancel", "response_id": response_id}))

    async def next(self) -> Event:
        async with asyncio.timeout(30):
            found: Event = json.loads(await self.socket.recv())
            return found

    async def until(self, *kinds: str) -> list[Event]:
        events = [await self.next()]
        while events[-1]["type"] not in kinds:
            events.append(await self.next())
        return events

    async def ask(self, given: Any = "hi", **fields: Any) -> list[Event]:
        await self.create(given, **fields)
        return await self.until(*ENDS)


@asynccontextmanager
async def connected(running: Running, key: str = "yap_token", path: str = "/v1/responses") -> AsyncIterator[Socket]:
    address = running.ws.removesuffix("/ws") + path
    async with websockets.connect(
        address, additional_headers={"Authorization": f"Bearer {key}"}, proxy=None, max_size=None
    ) as socket:
        yield Socket(socket)


def said(events: list[Event]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def text_of(response: Event) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


# --- the answer


async def test_a_response_has_the_fields_that_clients_read() -> None:
    async with door() as (client, _, _):
        found = await ask(client, metadata={"a": "b"}, tools=[FLAT])
        assert found["object"] == "response" and found["id"].startswith("resp_")
        assert (found["status"], found["error"], found["incomplete_details"]) == ("completed", None, None)
        assert (found["tools"], found["tool_choice"], found["metadata"]) == ([FLAT], "auto", {"a": "b"})
        (item,) = found["output"]
        assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
        assert item["content"] == [{"type": "output_text", "text": "Hello there.", "annotations": [], "logprobs": []}]
        usage = found["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and usage["output_tokens"] == 3
        assert usage["input_tokens_details"].keys() == {"cached_tokens", "cache_write_tokens"}
        assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


async def test_the_events_of_a_stream_and_of_a_socket_are_the_same_in_the_same_order() -> None:
    order = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    order += ["response.output_text.delta"] * 3 + ["response.output_text.done", "response.content_part.done"]
    order += ["response.output_item.done", "response.completed"]
    async with door(Script(pace=tick)) as (client, _, running), connected(running) as socket:
        for events in (await stream(client), await socket.ask()):
            assert [event["type"] for event in events] == order
            assert [event["sequence_number"] for event in events] == list(range(len(order)))
            created, added, delta, done = events[0], events[2], events[4], events[-1]
            assert created["response"]["status"] == "in_progress" and created["response"]["output"] == []
            assert added["item"] == done["response"]["output"][0] | {"status": "in_progress", "content": []}
            assert delta["item_id"] == added["item"]["id"] and delta["logprobs"] == []
            assert (delta["output_index"], delta["content_index"]) == (0, 0)
            assert said(events) == text_of(done["response"]) == events[7]["text"] == "Hello there."
            assert created["response"]["id"] == done["response"]["id"]


async def test_calls_are_items_and_their_outputs_bring_the_reply() -> None:
    async with door(decision=Script((CALL,))) as (client, engine, running), connected(running) as socket:
        for events in (await stream(client, tools=[FLAT]), await socket.ask("Weather?", tools=[FLAT])):
            kinds = [event["type"] for event in events if event["type"].startswith("response.function_call")]
            assert kinds == ["response.function_call_arguments.delta", "response.function_call_arguments.done"]
            (item,) = events[-1]["response"]["output"]
            assert (item["type"], item["name"], item["status"]) == ("function_call", "get_weather", "completed")
            assert json.loads(item["arguments"]) == {"place": "Oslo"} and item["call_id"] != item["id"]
        output = {"type": "function_call_output", "call_id": item["call_id"], "output": "4 degrees"}
        engine.requests.clear()
        again = await socket.ask([output], previous_response_id=events[-1]["response"]["id"], tools=[FLAT])
        assert said(again) == "Hello there." and "4 degrees" in prompts(engine)[-1]
        assert [sampling.json_schema for _, sampling, _ in engine.requests] == [None]
        whole = [{"role": "user", "content": "Weather?"}, {"type": "reasoning", "summary": []}, item, output]
        assert text_of(await ask(client, whole, tools=[FLAT])) == "Hello there."
        assert prompts(engine)[-1] == prompts(engine)[-2]


async def test_a_call_that_its_client_was_not_sent_is_no_part_of_the_conversation() -> None:
    """With `parallel_tool_calls: false` the first is sent. The others were kept, and had no result."""
    two = CALL[:-1] + "," + CALL[1:].replace("Oslo", "Bergen")
    async with door(decision=Script([two])) as (client, engine, _):
        first = await ask(client, "hi", tools=[FLAT], parallel_tool_calls=False)
        (call,) = first["output"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "warm"}
        await ask(client, [output], previous_response_id=first["id"], tools=[FLAT], parallel_tool_calls=False)
        assert "Oslo" in prompts(engine)[-1] and "Bergen" not in prompts(engine)[-1]


async def test_a_request_reaches_the_engine_as_one_of_chat_completions_does() -> None:
    async with door() as (client, engine, _):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        wanted = {"format": {"type": "json_schema", "name": "x", "schema": schema}, "verbosity": "low"}
        await ask(client, text=wanted, temperature=0.5, top_p=0.4, max_output_tokens=9, reasoning={"effort": "none"})
        sampling = engine.requests[-1][1]
        assert json.loads(sampling.json_schema or "") == schema
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.4, 9)
        talk = [("developer", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", "three")]
        items = [{"role": role, "content": [{"type": "input_text", "text": text}]} for role, text in talk]
        await ask(client, items, instructions="You are Ada.")
        here = prompts(engine)[-1]
        messages = [{"role": role, "content": text} for role, text in [("system", "You are Ada."), *talk]]
        await client.post("/v1/chat/completions", json={"model": "chat", "messages": messages})
        assert prompts(engine)[-1] == here


@pytest.mark.parametrize(("limit", "status"), [(2, "incomplete"), (None, "completed")])
async def test_only_a_limit_of_the_client_makes_a_response_incomplete(limit: int | None, status: str) -> None:
    """LiveKit takes an incomplete one for a failure."""
    async with door(Script(finish="length")) as (client, _, _):
        *_, last = await stream(client, **({"max_output_tokens": limit} if limit else {}))
        details = {"reason": "max_output_tokens"} if limit else None
        assert (last["type"], last["response"]["status"]) == (f"response.{status}", status)
        assert last["response"]["incomplete_details"] == details


# --- the conversation


async def test_a_response_is_continued_by_its_id_on_any_door_of_its_key() -> None:
    async with door() as (client, engine, running):
        first = await ask(client, "one", instructions="You are Ada.")
        async with connected(running) as socket:
            second = (await socket.ask("two", previous_response_id=first["id"]))[-1]["response"]
        third = await ask(client, "three", previous_response_id=second["id"])
        assert third["previous_response_id"] == second["id"]
        told = [("user", "one"), ("assistant", "Hello there."), ("user", "two"), ("assistant", "Hello there.")]
        turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in [*told, ("user", "three")])
        assert prompts(engine)[-1] == f"{turns}<|im_start|>assistant\n", "instructions are of one request"


@pytest.mark.parametrize("heard", ["Hello there.", "Hello"])
async def test_a_reply_that_is_said_again_is_what_was_heard(heard: str) -> None:
    async with door(INTERRUPTED_MARK="[cut]") as (client, engine, _):
        first = await ask(client, "one")
        again = [{"role": "assistant", "content": heard}, {"role": "user", "content": "two"}]
        await ask(client, again, previous_response_id=first["id"])
        assert prompts(engine)[-1].count("Hello") == 1
        assert ("Hello [cut]" in prompts(engine)[-1]) == (heard == "Hello")


async def test_an_utterance_that_got_no_reply_is_not_taken_for_one_that_is_said_again() -> None:
    async with door(Script([])) as (client, engine, _):
        first = await ask(client, "Yes please.")
        again = [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "two"}]
        await ask(client, again, previous_response_id=first["id"])
        assert "Yes please." in prompts(engine)[-1]


async def test_a_part_that_is_no_text_is_refused_wherever_it_stands() -> None:
    """In an output whose call is missing it was met when the reply was kept, and the response had no end."""
    parts = [{"type": "input_image", "text": "?"}]
    output = {"type": "function_call_output", "call_id": "c", "output": parts}
    calling = [
        {"role": "assistant", "content": parts},
        {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"},
        {**output, "output": "warm"},
    ]
    async with door() as (_, _, running), connected(running) as socket:
        for items in ([output], calling):
            (event,) = await socket.ask([{"role": "user", "content": "hi"}, *items])
            assert "input_image" in event["error"]["message"]


async def test_an_id_that_is_not_known_is_an_error_that_pipecat_retries() -> None:
    async with door() as (client, _, running), connected(running) as socket:
        wanted = {"model": "chat", "input": "hi", "previous_response_id": "resp_1"}
        answer = await client.post("/v1/responses", json=wanted)
        (event,) = await socket.ask(previous_response_id="resp_1")
        assert (answer.status_code, event["type"], event["status"]) == (400, "error", 400)
        for error in (answer.json()["error"], event["error"]):
            assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
        assert said(await socket.ask()) == "Hello there.", "the socket goes on"


async def test_after_a_restart_a_session_with_a_name_goes_on(tmp_path: Path) -> None:
    """LiveKit sends only what is new, however often its id is not found."""
    kept = {"SESSION_STORE": f"sqlite:{tmp_path / 'sessions.db'}"}
    async with door(**kept) as (client, _, _):
        first = await ask(client, "one", user="u")
    async with door(**kept) as (client, engine, running):
        await ask(client, "two", user="u", previous_response_id=first["id"])
        told = [("user", "one"), ("assistant", "Hello there."), ("user", "two")]
        turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in told)
        assert prompts(engine)[-1] == f"{turns}<|im_start|>assistant\n"
        async with connected(running) as socket:
            for fields in ({"user": "another"}, {}, {"user": "u", "store": False}):
                (event,) = await socket.ask("two", previous_response_id=first["id"], **fields)
                assert event["error"]["code"] == "previous_response_not_found"


async def test_a_response_is_of_its_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{n} sha256:{hashlib.sha256(n.encode()).hexdigest()}\n" for n in ("a", "b")))
    keys.chmod(0o600)
    async with door(YAP_TEXT_KEY_FILE=str(keys)) as (client, _, _):
        client.headers["Authorization"] = "Bearer a"
        first = await ask(client)
        await ask(client, previous_response_id=first["id"])
        client.headers["Authorization"] = "Bearer b"
        wanted = {"model": "chat", "input": "hi", "previous_response_id": first["id"]}
        assert (await client.post("/v1/responses", json=wanted)).status_code == 400


async def test_what_is_not_to_be_stored_is_known_to_its_socket_alone() -> None:
    async with door() as (_, _, running), connected(running) as socket, connected(running) as other:
        first = (await socket.ask(store=False))[-1]["response"]
        assert (await socket.ask(store=False, previous_response_id=first["id"]))[-1]["type"] == "response.completed"
        assert (await other.ask(previous_response_id=first["id"]))[-1]["type"] == "error"


async def test_forget_erases_responses_and_ends_the_one_that_runs() -> None:
    gate = Gate()
    async with door(Script(["a"] * 50, pace=gate)) as (client, engine, running):
        gate.step(50)
        first = await ask(client, user="s")
        async with running.connect() as ws, connected(running) as socket:
            await socket.create(user="s")
            await until(lambda: engine.running == 1)
            await ws.send(json.dumps({"type": "forget", "session_id": "s"}))
            assert json.loads(await ws.recv()) == {"type": "forgotten", "session_id": "s", "known": True}
            last = (await socket.until(*ENDS))[-1]["response"]
            assert last["status"] == "cancelled"
            for known in (first, last):
                assert (await socket.ask(previous_response_id=known["id"]))[-1]["type"] == "error"


async def test_a_warm_up_answers_nothing_and_its_prefix_is_found() -> None:
    async with door() as (_, engine, running), connected(running) as socket:
        talk = [{"role": "user", "content": "one " * 40}, {"role": "assistant", "content": "two " * 40}]
        await socket.create(talk, instructions="You are Ada.", generate=False, tools=[FLAT])
        *_, warmed = await socket.until(*ENDS)
        assert (warmed["type"], warmed["response"]["output"]) == ("response.completed", [])
        assert all(sampling.max_tokens == 1 for _, sampling, _ in engine.requests)
        warm_id = warmed["response"]["id"]
        *_, last = await socket.ask("three", instructions="You are Ada.", previous_response_id=warm_id)
        assert (
            last["response"]["usage"]["input_tokens_details"]["cached_tokens"]
            >= warmed["response"]["usage"]["input_tokens"] - 16
            > 64
        )


# --- the socket


@pytest.mark.parametrize("ends", ["the next request", "a cancel", "a close"])
async def test_a_warm_up_keeps_nobody_waiting(ends: str) -> None:
    """It has the lowest priority: the turn that it is for would wait for everybody else's."""
    async with door(Script(pace=Gate())) as (_, engine, running), connected(running) as socket:
        talk = [{"role": role, "content": "one " * 40} for role in ("user", "assistant")]
        await socket.create(talk, generate=False)
        await until(lambda: engine.running == 1)
        engine.chat = Script()
        if ends == "a cancel":
            await socket.cancel()
        elif ends == "a close":
            await socket.socket.close()
        else:
            await socket.create(talk, generate=False)
            await socket.create()
            assert (await socket.until(*ENDS))[-1]["response"]["usage"]["input_tokens"] == 0
            await socket.until(*ENDS)
        if ends != "a close":
            assert (await socket.until(*ENDS))[-1]["type"] in ("response.completed", "response.incomplete")
        await until(lambda: engine.running == 0)


async def test_a_cancel_ends_the_response_with_what_was_sent() -> None:
    gate = Gate()
    async with door(Script(["a"] * 50, pace=gate)) as (_, engine, running), connected(running) as socket:
        await socket.create()
        gate.step(3)
        events = await socket.until("response.output_text.delta")
        await socket.cancel(events[0]["response"]["id"])
        events += await socket.until(*ENDS)
        assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.incomplete", "cancelled")
        assert text_of(events[-1]["response"]) == said(events)
        await until(lambda: engine.running == 0 and engine.aborted == 1)
        await socket.cancel(
            "resp_of_another"
        )  # a cancel that comes late is not an error: Pipecat would take it for one
        await socket.cancel(events[0]["response"]["id"])
        gate.step(50)
        assert (await socket.ask())[-1]["type"] == "response.completed"


async def test_after_a_cancel_come_those_that_wait_and_it_is_continued() -> None:
    """The turn's end ended the task of the whole socket: the others waited for ever, and its id was not known."""
    gate = Gate()
    async with door(Script(["a"] * 50, pace=gate)) as (_, engine, running), connected(running) as socket:
        await socket.create("one")
        gate.step()
        first = (await socket.until("response.output_text.delta"))[0]["response"]["id"]
        for text in ("two", "three"):
            await socket.create(text)
        await socket.cancel(first)
        ends = [(await socket.until(*ENDS))[-1]["response"]["status"]]
        gate.step(200)
        ends += [(await socket.until(*ENDS))[-1]["response"]["status"] for _ in range(2)]
        assert ends == ["cancelled", "completed", "completed"]
        await socket.ask("four", previous_response_id=first)
        assert "<|im_start|>assistant\na<|im_end|>" in prompts(engine)[-1]


async def test_a_cancel_before_the_first_event_counts() -> None:
    gate = Gate()
    async with door(Script(["a"] * 50, pace=gate)) as (_, _, running), connected(running) as socket:
        await socket.create()
        await socket.cancel()
        assert (await socket.until(*ENDS))[-1]["response"]["status"] == "cancelled"


async def test_a_cancel_of_the_response_before_ends_one_whose_id_its_client_has_not_read() -> None:
    gate = Gate()
    async with door() as (_, engine, running), connected(running) as socket:
        before = (await socket.ask())[-1]["response"]["id"]
        engine.chat = Script(["a"] * 50, pace=gate)
        await socket.create()
        await socket.cancel(before)
        assert (await socket.until(*ENDS))[-1]["response"]["status"] == "cancelled"


async def test_a_cancel_that_comes_late_does_not_end_a_response_that_waited_meanwhile() -> None:
    gate = Gate()
    async with door(Script(pace=gate)) as (_, engine, running), connected(running) as socket:
        await socket.create()
        await socket.create()
        gate.step(3)
        first = (await socket.until(*ENDS))[-1]["response"]["id"]
        await until(lambda: engine.running == 1)
        await socket.cancel(first)
        gate.step(3)
        assert (await socket.until(*ENDS))[-1]["response"]["status"] == "completed"


async def test_responses_that_are_asked_at_once_come_in_their_order() -> None:
    async with door() as (_, engine, running), connected(running) as socket:
        for text in ("one", "two", "three"):
            await socket.create(text)
        ends = [(await socket.until(*ENDS))[-1] for _ in range(3)]
        assert [end["type"] for end in ends] == ["response.completed"] * 3
        assert ["one" in each for each in prompts(engine)] == [True, False, False]


async def test_over_the_limit_of_waiting_responses_one_is_refused() -> None:
    gate = Gate()
    async with door(Script(pace=gate)) as (_, engine, running), connected(running) as socket:
        await socket.create()
        await until(lambda: engine.running == 1)
        for _ in range(9):
            await socket.create()
        event = (await socket.until("error"))[-1]
        assert (event["status"], event["error"]["code"]) == (429, "rate_limit_exceeded")
        gate.step(100)
        assert len([await socket.until("response.completed") for _ in range(9)]) == 9


async def test_an_error_says_when_to_try_again_where_the_official_client_reads_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"a sha256:{hashlib.sha256(b'a').hexdigest()} turns_per_minute=1\n")
    keys.chmod(0o600)
    async with door(YAP_TEXT_KEY_FILE=str(keys)) as (_, _, running), connected(running, "a") as socket:
        await socket.ask()
        (event,) = await socket.ask()
        assert event["status"] == 429
        headers = event["error"]["headers"]
        assert 50_000 < int(headers["retry-after-ms"]) <= 60_000 and headers["retry-after"] == "60"


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ("nonsense", "JSON is malformed"),
        ('{"type": "response.steer"}', "response.steer"),
        ('{"type": "response.create", "input": [{"type": "image"}]}', "an item is 'image'; allowed are message"),
        ('{"type": "response.create"}', "there is no input"),
        ('{"type": "response.create", "input": "a", "tools": [{"type": "web_search"}]}', "allowed is 'function'"),
        ('{"type": "response.create", "input": "a", "conversation": "c"}', "conversation is not supported"),
        ('{"type": "response.create", "input": [{"content": "a"}]}', "a message has no role"),
    ],
)
async def test_a_wrong_frame_is_an_error_and_the_socket_goes_on(frame: str, words: str) -> None:
    async with door() as (_, _, running), connected(running) as socket:
        await socket.socket.send(frame)
        event = await socket.next()
        assert (event["type"], event["status"], event["error"]["type"]) == ("error", 400, "invalid_request_error")
        assert words in event["error"]["message"]
        assert said(await socket.ask()) == "Hello there."


@pytest.mark.parametrize("path", ["/v1/responses", "/v1"])
async def test_the_model_may_stand_in_the_address(path: str) -> None:
    """As LiveKit has it, whose socket opens the base URL itself."""
    async with door() as (_, engine, running), connected(running, path=f"{path}?model=persona/coach") as socket:
        await socket.socket.send(json.dumps({"type": "response.create", "input": "hi"}))
        last = (await socket.until(*ENDS))[-1]["response"]
        assert last["model"] == "persona/coach" and "You are Yap" in prompts(engine)[-1]


# --- failures


async def test_an_engine_that_fails_ends_the_response_and_not_the_socket() -> None:
    script = Script(("Hello", " there"), pace=tick, error=EngineFailed("The engine failed."))
    async with door(script) as (client, engine, running), connected(running) as socket:
        for events in (await stream(client), await socket.ask()):
            response = events[-1]["response"]
            assert (events[-1]["type"], response["status"]) == ("response.failed", "failed")
            assert response["error"] == {"code": "server_error", "message": "The engine failed."}
            assert text_of(response) == said(events) == "Hello there"
        engine.chat = Script()
        assert said(await socket.ask()) == "Hello there."
