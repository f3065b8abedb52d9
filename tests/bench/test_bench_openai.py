"""bench/openai.py: one conversation with a server of chat completions, and what such servers may do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from yaptext.bench.openai import OpenAI
from yaptext.bench.plan import Sampling
from yaptext.bench.prompts import Story
from yaptext.client.errors import Refused

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]
STORY = Story("You are kind.", "User: hi\nAssistant: hello")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Peer:
    """A server that keeps the requests it got; `connections` counts how often it was called."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.requests: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = self.left = 0
        self._tasks: set[asyncio.Task[None] | None] = set()
        """A loop holds its tasks weakly: one that waits for what only it holds could be collected."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.add(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
                self.heads.append(head)
                self.requests.append(json.loads(await reader.readexactly(length)))
                await self._answer(self.requests[-1], writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left += 1
        finally:
            writer.close()


@asynccontextmanager
async def peer(answer: Answer) -> AsyncIterator[tuple[Peer, OpenAI]]:
    served = Peer(answer)
    async with await asyncio.start_server(served.serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield served, OpenAI(url, "a-model", "secret", Sampling(8))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(content: Any) -> bytes:
    return chunk(b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n")


def delta(**fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields}]})


async def speak(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """What vLLM sends: a role without text, texts, a finish, the usage, the end."""
    usage = {"prompt_tokens": 20, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 16}}
    parts = [delta(role="assistant", content=""), delta(content="Hel"), delta(content="lo.")]
    last = [event({"choices": [], "usage": usage}), event(b"[DONE]"), b"0\r\n\r\n"]
    writer.write(HEAD + b"".join(parts + last))
    await writer.drain()


async def test_a_turn_is_a_streamed_completion() -> None:
    """The story is the system message, the reply's texts are its tokens, the usage is read at the end."""
    async with peer(speak) as (served, target):
        conversation = target.conversation()
        await conversation.open()
        conversation.meet("s", STORY)
        turn = await conversation.begin("What now?")
        await turn.over.wait()
        assert turn.outcome == "done" and turn.text == ["Hel", "lo."] and turn.acked_at is None
        assert (turn.prompt_tokens, turn.cached_tokens, turn.completion_tokens) == (20, 16, 2)
        await conversation.close()
    (sent,) = served.requests
    assert sent["model"] == "a-model" and sent["stream"] and sent["max_tokens"] == 8 and sent["temperature"] == 0
    system, user = sent["messages"]
    assert system["role"] == "system" and user == {"role": "user", "content": "What now?"}
    told = r"<\|persona\|>\nYou are kind\.\n<\|history\|>\nUser: hi\nAssistant: hello\nNow: \w+day, \d\d:\d\d\."
    assert re.fullmatch(told, system["content"])
    assert served.heads[0].startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer secret" in served.heads[0]


async def test_a_history_may_be_messages_in_roles() -> None:
    """Nothing but the persona is in the system message then, and no time; other fields go along with every request."""
    async with peer(speak) as (served, target):
        fields = {"top_k": 0, "max_tokens": 4}
        conversation = OpenAI(target.url, "a-model", None, Sampling(8), in_roles=True, fields=fields).conversation()
        await conversation.open()
        conversation.meet("s", STORY)
        await conversation.warm()
        for again in (False, False, True):
            await (await conversation.begin("And?", again=again)).over.wait()
        await conversation.close()
    warm, first, second, third = served.requests
    told = [("system", "You are kind."), ("user", "hi"), ("assistant", "hello")]
    said = [[(message["role"], message["content"]) for message in sent["messages"]] for sent in served.requests]
    assert said[0] == [*told, ("user", ".")] and warm["max_tokens"] == 1 and warm["top_k"] == 0
    assert said[1] == said[3] == [*told, ("user", "And?")]
    assert said[2] == [*said[1], ("assistant", "Hello."), ("user", "And?")]
    assert all(sent["top_k"] == 0 and sent["max_tokens"] == 4 for sent in (first, second, third))
    assert "Authorization" not in served.heads[0]


async def test_a_conversation_grows_unless_it_is_told_anew() -> None:
    """Over one connection, which stays open between turns."""
    async with peer(speak) as (served, target):
        conversation = target.conversation()
        await conversation.open()
        conversation.meet("s", STORY)
        for again in (False, False, True):
            await (await conversation.begin("And?", again=again)).over.wait()
        conversation.meet("t", STORY)
        await (await conversation.begin("And?")).over.wait()
        await conversation.close()
    roles = [[message["role"] for message in sent["messages"]] for sent in served.requests]
    first = ["system", "user"]
    assert roles == [first, [*first, "assistant", "user"], first, first]
    assert served.requests[1]["messages"][2]["content"] == "Hello." and served.connections == 1


@pytest.mark.parametrize("by_a_new_turn", [False, True])
async def test_barging_in_closes_the_connection(by_a_new_turn: bool) -> None:
    """What was heard stays in the conversation, and the next turn has a connection of its own."""

    async def speak_on(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + delta(content="So"))
        await writer.wait_closed()

    async with peer(speak_on) as (served, target):
        conversation = target.conversation()
        await conversation.open()
        conversation.meet("s", STORY)
        turn = await conversation.begin("Go on")
        assert await turn.reaches(1)
        if not by_a_new_turn:
            conversation.cancel()
        following = await conversation.begin("Stop")
        assert turn.outcome == "cancelled" and turn.replaced == by_a_new_turn and turn.cancelled_at is None
        assert await following.reaches(1)
        conversation.drop()
        assert following.outcome == "failed"
        assert [m["content"] for m in served.requests[1]["messages"][1:]] == ["Go on", "So", "Stop"]
        assert served.connections == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}", "http_503"),
        (HEAD + event(b"{not json"), "malformed"),
        (b"SSH-2.0\r\n\r\n", "malformed"),
        (HEAD + event({"error": {"message": "no"}}), "error_event"),
        (b"", "closed"),
        (HEAD + delta(content="So"), "closed"),
    ],
)
async def test_what_goes_wrong_ends_the_turn(answer: bytes, error: str) -> None:
    """Named, and without a wait for what will never come."""

    async def fail(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with peer(fail) as (_, target):
        conversation = target.conversation()
        await conversation.open()
        conversation.meet("s", STORY)
        turn = await conversation.begin("Hello")
        await turn.over.wait()
        assert (turn.outcome, turn.error) == ("failed", error)
        with pytest.raises(Refused, match=error):
            await conversation.warm()
        await conversation.close()


@pytest.mark.parametrize("listens", [True, False])
async def test_a_kept_connection_that_closes_before_an_answer_is_replaced(listens: bool) -> None:
    """A server may close it for its idleness just when a request comes. With no other to be had the turn fails."""

    async def tired(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if len(served.requests) == 2:
            if not listens:
                server.close()
            writer.close()
        else:
            await speak(body, writer)

    served = Peer(tired)
    async with await asyncio.start_server(served.serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        conversation = OpenAI(url, "a-model", "secret", Sampling(8)).conversation()
        await conversation.open()
        conversation.meet("s", STORY)
        await (await conversation.begin("And?")).over.wait()
        turn = await conversation.begin("And then?")
        async with asyncio.timeout(10):
            await turn.over.wait()
        await conversation.close()
    if listens:
        assert (turn.outcome, turn.text, served.connections) == ("done", ["Hel", "lo."], 2)
        assert served.requests[1] == served.requests[2]
    else:
        assert (turn.outcome, turn.error) == ("failed", "closed")


async def test_an_address_where_nobody_listens_is_named() -> None:
    """The line says where it was tried."""
    async with peer(speak) as (_, target):
        pass
    with pytest.raises(Refused, match=r"^cannot connect to 127\.0\.0\.1:"):
        await target.conversation().open()
