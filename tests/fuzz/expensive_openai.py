"""Bodies and frames of OpenAI's doors that may hold the event loop long, and how long each does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from conftest import MemorySocket, Talk, talking
from fuzz.expensive import MAX_BYTES, PIECES, counts, engine, holds, repeated, texts, tools
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from yaptext.server.access.accounts import Account, Keys
from yaptext.server.access.keyfile import NO_LIMITS, Key
from yaptext.server.access.sparing import Sparing
from yaptext.server.admission import Admission
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.openai import door
from yaptext.server.openai.responses_socket import ResponsesSocket
from yaptext.server.pending import PendingConnections
from yaptext.server.service import Service

_PIECE_BYTES = 65_536
"""Of a body, as they arrive."""
_ENDS = ("response.completed", "response.incomplete", "response.failed", "error")

junk = st.sampled_from(["[]", "{}", '{"a":1}', "1.2345678901234567e-300", '"\\u00e9"', "0", '[{"a":[]}]'])
many = st.builds(lambda item, count: f"[{','.join([item] * count)}]", junk, counts)
named = st.builds(lambda item, count: "{" + ",".join(f'"k{n}":{item}' for n in range(count)) + "}", junk, counts)
anything = st.one_of(many, named).map(lambda text: {"raw": text})
"""JSON that stands for itself: see `dumps`."""
short = st.builds(repeated, st.sampled_from(PIECES), st.sampled_from([0, 1, 10, 100, 5_000]))
contents = st.one_of(texts, st.builds(lambda count, text: [{"type": "text", "text": text}] * count, counts, short))
roles = st.sampled_from(["system", "user", "assistant", "developer"])
calls = st.builds(
    lambda count, text: [{"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}] * count,
    counts,
    st.sampled_from(["{}", "", "[" * 60 + "]" * 60, '{"a":' * 60 + "1" + "}" * 60, '{"a": [' + "0," * 9000 + "0]}"]),
)
a_message = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": contents}),
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": calls}),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": st.just("1"), "content": short}),
)
messages = st.one_of(
    st.lists(a_message, min_size=1, max_size=3),
    st.builds(lambda some, count: some * count, st.lists(a_message, min_size=1, max_size=2), counts),
)
an_item = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": contents}),
    st.fixed_dictionaries(
        {"type": st.just("function_call"), "call_id": short, "name": st.just("f"), "arguments": short}
    ),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": short, "output": contents}),
    st.just({"type": "reasoning"}),
    st.just({}),
)
items = st.one_of(
    texts,
    st.lists(an_item, max_size=3),
    st.builds(lambda some, count: some * count, st.lists(an_item, min_size=1, max_size=2), counts),
)
_schemas = tools.filter(bool).map(lambda found: found[0]["parameters"])
_flat = tools.map(lambda found: [{"type": "function"} | tool for tool in found])
bodies = st.fixed_dictionaries(
    {"messages": messages},
    optional={
        "tools": st.one_of(_flat, anything), "metadata": anything, "stop": st.one_of(anything, texts),
        "tool_choice": anything, "stream": st.booleans(), "user": texts, "model": texts, "logit_bias": anything,
        "response_format": st.one_of(
            _schemas.map(lambda found: {"type": "json_schema", "json_schema": {"schema": found}}),
            anything.map(lambda found: {"type": "json_schema", "json_schema": {"schema": found}}),
        ),
    },
)  # fmt: skip
responses = st.fixed_dictionaries(
    {"input": items},
    optional={
        "tools": st.one_of(_flat, anything), "metadata": anything, "conversation": anything, "instructions": texts,
        "tool_choice": anything, "stream": st.booleans(), "user": texts, "model": texts, "generate": st.booleans(),
        "text": st.one_of(_schemas, anything).map(lambda found: {"format": {"type": "json_schema", "schema": found}}),
    },
)  # fmt: skip


def dumps(value: Any) -> str:
    """JSON text. A list ends where it comes to be too long."""
    if isinstance(value, dict):
        if value.keys() == {"raw"}:
            return str(value["raw"])
        return "{" + ",".join(f"{json.dumps(name)}:{dumps(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        known = {id(item): item for item in value}  # one item may be there many times
        written = {key: dumps(item) for key, item in known.items()}
        fitting, size = [], 0
        for item in value:
            fitting.append(written[id(item)])
            if (size := size + len(fitting[-1]) + 1) > MAX_BYTES:
                fitting.pop()
                break
        return "[" + ",".join(fitting) + "]"
    return json.dumps(value)


def _bounded(given: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[str]:
    return given.map(dumps).filter(lambda text: len(text) <= MAX_BYTES)


chat_bodies, responses_bodies = _bounded(bodies), _bounded(responses)
creates = responses_bodies.map(lambda body: '{"type":"response.create",' + body[1:])


class _Socket(MemorySocket):
    query_params = QueryParams()

    async def until_end(self, count: int) -> None:
        await self.until(lambda frame: frame["type"] in _ENDS, count)


def _service(talk: Talk) -> Service:
    lifecycle, settings = Lifecycle(), talk.runtime.settings
    lifecycle.phase = "ready"
    admission, pending = Admission(100), PendingConnections(100, 60)
    return Service(
        settings, talk.runtime, admission, pending, Keys("own"), lifecycle, Sparing(lambda *_, **__: None, "none"), 0.0
    )


async def hold_of_body(path: str, body: str) -> float:
    """Milliseconds, of a body of `/v1/`."""
    app = {"chat": door.chat_completions, "responses": door.responses}[path]
    async with talking(engine(), engine()) as talk:
        service = _service(talk)

        async def post(content: bytes) -> None:
            parts = [content[at : at + _PIECE_BYTES] for at in range(0, len(content), _PIECE_BYTES)]

            async def receive() -> dict[str, Any]:
                if not parts:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}

            async def send(_: dict[str, Any]) -> None:
                await asyncio.sleep(0)

            scope = {
                "type": "http", "method": "POST", "path": f"/v1/{path}", "query_string": b"", "client": ("::1", 1),
                "headers": [(b"authorization", b"Bearer own")], "state": {"service": service},
            }  # fmt: skip
            await app(scope, receive, send)

        hi = {"chat": '{"messages":[{"role":"user","content":"hi"}]}', "responses": '{"input":"hi"}'}[path]
        await post(hi.encode())
        with holds() as found:
            await asyncio.sleep(0)
            found.clear()
            await post(body.encode())
        return max(found) * 1000


async def hold_of_chat(body: str) -> float:
    return await hold_of_body("chat", body)


async def hold_of_responses(body: str) -> float:
    return await hold_of_body("responses", body)


async def hold_of_create(frame: str) -> float:
    """Milliseconds, of a frame of the responses' socket."""
    async with talking(engine(), engine()) as talk:
        socket = _Socket()
        slots = _service(talk).admission.slots
        account = Account(Key("own", b"", NO_LIMITS))
        serving = asyncio.ensure_future(ResponsesSocket(socket, talk.runtime, account, slots).serve())  # type: ignore[arg-type]
        socket.say("response.create", input="hi")
        await socket.until_end(1)
        with holds() as found:
            await asyncio.sleep(0)
            found.clear()
            socket.say_raw(frame)
            await socket.until_end(2)
        socket.leave()
        await serving
        return max(found) * 1000


def _talk(count: int, message: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [message] * count}


_CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
_SCHEMA = {"type": "json_schema", "schema": {"raw": "{" + ",".join(f'"k{n}":[]' for n in range(60_000)) + "}"}}
_HI = {"messages": [{"role": "user", "content": "hi"}]}
_MANY = {"raw": f"[{','.join(['{}'] * 300_000)}]"}
_NAMED = {"raw": "{" + ",".join(f'"k{n}":[]' for n in range(70_000)) + "}"}
KNOWN_CHAT = [
    _HI | {"metadata": _NAMED},
    _HI | {"tools": _MANY},
    _HI | {"stop": _MANY},
    _HI | {"stop": {"raw": '["",' + '"",' * 300_000 + '""]'}},
    _HI | {"response_format": {"type": "json_schema", "json_schema": {"schema": _NAMED}}},
    _talk(40_000, {"role": "user"}),
    _talk(30_000, {"role": "system", "content": "a"}),
    _talk(1, {"role": "user", "content": [{"type": "text"}] * 55_000}),
    _talk(1, {"role": "assistant", "content": [{"type": ""}] * 80_000}),
    _talk(1, {"role": "assistant", "tool_calls": [{"id": "", "function": {"name": ""}}] * 25_000}),
    _talk(800, {"role": "assistant", "tool_calls": [{"id": "", "function": {"name": ""}}] * 30}),
    _talk(600, {"role": "user", "content": "a " * 800}),
]
KNOWN_RESPONSES = [
    {"input": "hi", "metadata": _NAMED},
    {"input": "hi", "tools": _MANY},
    {"input": "hi", "conversation": _MANY},
    {"input": "hi", "text": {"format": _SCHEMA}},
    {"input": [{}] * 300_000},
    {"input": [{"role": "user"}] * 60_000},
    {"input": [{"type": "reasoning"}] * 40_000},
    {"input": [_CALL] * 13_000},
    {"input": [{"type": "function_call_output", "output": [{"type": ""}] * 80_000}]},
    {"input": [{"role": "system", "content": "a"}] * 25_000},
]
