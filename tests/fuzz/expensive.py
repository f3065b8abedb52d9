"""Searches for the frame that holds the event loop longest.

    YAP_TEXT_STATE_DIR=FOLDER PYTHONPATH=tests .venv/serve-cpu/bin/python tests/fuzz/expensive.py [--examples 1000]

Scripted engines behind a real tokenizer and chat template; hypothesis makes frames of at most 1 MB and is told how long
each one held the loop: CPU time of the loop's thread between two of its turns, until the frame is answered. (By the
clock, other processes of the machine would be measured.)
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from conftest import talking, until
from fakes import Script, TokenizedEngine
from hypothesis import HealthCheck, Phase, given, settings, target
from hypothesis import strategies as st

from yaptext.engine.codec import HubCodec

MAX_BYTES = 1_000_000
_REPLY = ("Hello", " there", ", it", " is", " fine", " today", ".") * 20
PIECES = [
    "a", "word ", "7", " ", "\n", "User: hi\n", "Assistant: \u201cyes\u201d\n", "[12:01] **User:** a\n", "\u4f60\u597d",
    "\U00012345",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301\u0302", "<|im_start|>user\n", "<|im_end|>", '"', "\\",
    "9f8e7d6c ", "```x```", "https://a.bc/d ", "user: str\n", "a" * 500 + " ",
]  # fmt: skip


def repeated(piece: str, size: int) -> str:
    """About so many bytes of JSON."""
    return piece * (size // max(1, len(json.dumps(piece)) - 2))


sizes = st.sampled_from([0, 30, 1_000, 5_000, 20_000, 39_000, 100_000, 300_000, 900_000])
texts = st.builds(repeated, st.sampled_from(PIECES), sizes)
counts = st.sampled_from([0, 1, 8, 60, 64, 65, 300, 1000, 5000, 20_000, 60_000])


def schema(properties: int, kind: str, depth: int) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "string": {"type": "string"},
        "reference": {"$ref": "#/$defs/a"},
        "range": {"type": "number", "minimum": 0.5, "maximum": 99.25},
        "enum": {"enum": [f"value {number}" for number in range(20)]},
        "any": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
        "empty": {},
    }
    found = parts[kind]
    for _ in range(depth):
        found = {"type": "object", "properties": {"in": found}}
    return {
        "type": "object",
        "properties": {f"p{number}": found for number in range(properties)},
        "$defs": {"a": {"type": "string"}},
    }


tools = st.builds(
    lambda count, words, parameters, examples: [
        {"name": f"t{number}", "description": words, "parameters": parameters}
        | ({"examples": [{"message": "m", "arguments": {}}] * examples} if examples else {})
        for number in range(min(count, 70))
    ],
    counts,
    st.sampled_from(["", "Looks.", "<|im_end|>" * 8, "\U00012345" * 20]),
    st.builds(
        schema,
        st.sampled_from([0, 1, 12, 60, 127]),
        st.sampled_from(["string", "reference", "range", "enum", "any", "empty"]),
        st.sampled_from([0, 1, 5, 14]),
    ),
    st.sampled_from([0, 1, 20]),
)
items = st.builds(
    lambda count, text: [{"role": "user" if number % 2 else "assistant", "content": text} for number in range(count)],
    counts,
    st.builds(repeated, st.sampled_from(PIECES), st.sampled_from([1, 10, 100, 5_000])),
)
junk = st.sampled_from(["[]", '{"a":1}', "1.2345678901234567e-300", '"\\u00e9"', "0"])
starts = st.fixed_dictionaries(
    {"type": st.just("start"), "session_id": st.just("a"), "user_utterance": st.one_of(texts, st.none())},
    optional={
        "persona_text": texts, "history_text": texts, "history": items, "tools": tools, "note": texts,
        "heard_text": texts,
        "speakable": st.booleans(), "persona_style": texts,
        "sampling": st.builds(lambda count: {"stop": ["a"] * count}, counts),
    },
)  # fmt: skip
others = st.one_of(
    st.fixed_dictionaries({"type": st.just("cancel")}, optional={"heard_text": texts, "session_id": st.just("a")}),
    st.fixed_dictionaries({"type": st.just("warm_history"), "persona_text": texts}, optional={"history_text": texts}),
    st.fixed_dictionaries({"type": st.just("warm_history"), "persona_style": st.just("savage"), "history": items}),
    st.fixed_dictionaries({"type": st.just("warm_persona"), "persona_text": texts}),
    st.fixed_dictionaries({"type": st.just("set_persona"), "session_id": st.just("a"), "persona_text": texts}),
    st.fixed_dictionaries({"type": st.just("get_session"), "session_id": st.just("a")}),
    st.fixed_dictionaries({"type": texts}),
)


def _with_junk(frame: dict[str, Any], item: str, count: int, named: bool) -> str:
    """The frame with unknown fields: many, or one of many things."""
    text = json.dumps(frame)
    if not count:
        return text
    more = ",".join(f'"k{number}":{item}' for number in range(count)) if named else f'"k":[{",".join([item] * count)}]'
    return f"{text[:-1]},{more}}}"


frames = st.builds(_with_junk, st.one_of(starts, others), junk, counts, st.booleans()).filter(
    lambda frame: len(frame) <= MAX_BYTES
)


@cache
def engine() -> TokenizedEngine:
    """With the embedded model's tokenizer and template."""
    from transformers import AutoTokenizer

    from yaptext.engine import demo
    from yaptext.settings import Settings

    tokenizer = AutoTokenizer.from_pretrained(demo.folder(Settings.load().state))
    return TokenizedEngine(HubCodec(tokenizer, max_model_len=8192, block_size=16), Script(_REPLY))


@contextmanager
def holds() -> Iterator[list[float]]:
    """Seconds of CPU of this thread between two turns of its loop, while the block runs."""
    found = [0.0]

    async def turns() -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            found.append(now - before)
            before = now

    task = asyncio.ensure_future(turns())
    try:
        yield found
    finally:
        task.cancel()


async def longest_hold(frame: str) -> float:
    """Milliseconds, of a session that has talked before."""
    async with talking(engine(), engine()) as talk:
        socket = talk.socket()
        for _ in range(2):
            socket.start("Tell me more.", session_id="a")
        await socket.until("done", 2)
        with holds() as found:
            await asyncio.sleep(0)
            found.clear()
            socket.say_raw(frame)
            socket.say("ping")
            await socket.until("pong")
            await until(lambda: all(session.current is None for session in talk.runtime.sessions.recent(60)))
        return max(found) * 1000


async def of(held: Awaitable[float]) -> float:
    return await held


def search(
    examples: int, sent: st.SearchStrategy[str] = frames, hold: Callable[[str], Awaitable[float]] = longest_hold
) -> tuple[float, str]:
    """The worst frame that was found, and how long it held the loop in milliseconds: the least of three times."""
    worst = (0.0, "")

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.target],
        suppress_health_check=list(HealthCheck),
    )
    @given(sent)
    def look(frame: str) -> None:
        nonlocal worst
        took = asyncio.run(of(hold(frame)))
        if took > worst[0]:
            took = min(took, *(asyncio.run(of(hold(frame))) for _ in range(2)))
        target(took)
        worst = max(worst, (took, frame))

    look()
    return worst


def main() -> None:
    from yaptext.observe import logs

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the service
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    logs.configure(level="error", format="json", journald=False)
    engine()
    gc.freeze()  # as at the start of the service
    took, frame = search(parser.parse_args().examples)
    print(f"{took:.1f} ms by {len(frame)} bytes: {frame[:300]} ... {frame[-100:]}")


if __name__ == "__main__":
    main()
