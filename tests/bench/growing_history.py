"""How much of each prompt the prefix cache holds while a conversation grows, through each door.

    YAP_TEXT_STATE_DIR=FOLDER .venv/serve-cpu/bin/python tests/bench/growing_history.py [--turns 8] [--pause 2]

One conversation a way, on one engine with the demo model and over real sockets, greedy. On `/ws` the service keeps the
history, or the client sends all of it with each turn; a client of `/v1/chat/completions` always does, with a session's
name (`prompt_cache_key`) or without. Only the first words of a way's persona are its own, so that nothing is shared.
Figures are of the turns after the first: cached tokens are those that the client reads in `usage`, tokens left are what
the turn itself computed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest.py
from conftest import Running, service
from test_service import Borrowed

from yaptext.bench.conversation import Conversation
from yaptext.bench.openai import OpenAI
from yaptext.bench.plan import Sampling
from yaptext.bench.prompts import Prompts, Story
from yaptext.bench.service import Service
from yaptext.bench.text import number, table
from yaptext.bench.turn import Turn
from yaptext.engine.base import Engines
from yaptext.engine.registry import open_engines
from yaptext.observe import logs
from yaptext.settings import Settings

KEY = "yap_token"
TURN_LIMIT_S = 120.0


class Way(NamedTuple):
    name: str
    door: str
    format: str = "segments"
    warm: bool = True
    """`WARM_NEXT_TURN`, which is for `/ws` alone."""
    again: bool = False
    """On `/ws`: the client sends the whole history with each turn."""
    named: bool = False
    """On `completions`: the requests name their session."""


WAYS = (
    Way("completions", "completions"),
    Way("completions, session named", "completions", named=True),
    Way("/ws, turns", "ws", "turns"),
    Way("/ws, turns, history sent", "ws", "turns", again=True),
    Way("/ws, segments", "ws"),
    Way("/ws, segments, history sent", "ws", again=True),
    Way("/ws, segments, WARM_NEXT_TURN=0", "ws", warm=False),
)


def conversation(way: Way, running: Running, sampling: Sampling) -> Conversation:
    if way.door == "ws":
        return Service(running.ws, KEY, sampling).conversation()
    fields: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # as `Service` asks for
    if way.named:
        fields["prompt_cache_key"] = "growing"
    return OpenAI(running.http, "chat", KEY, sampling, in_roles=True, fields=fields).conversation()


async def talk(way: Way, running: Running, prompts: Prompts, given: argparse.Namespace) -> list[Turn]:
    """All turns of one conversation, as its client saw them."""
    story = prompts.story(0)
    lines = story.history.splitlines()
    client = conversation(way, running, Sampling(given.max_tokens))
    await client.open()
    client.meet("growing", story)
    turns = []
    for number_of_turn in range(given.turns):
        said = prompts.utterance(0, number_of_turn)
        if way.again:
            client.meet("growing", Story(story.persona, "\n".join(lines)))
        turn = await client.begin(said)
        async with asyncio.timeout(TURN_LIMIT_S):
            await turn.over.wait()
        if turn.outcome != "done":
            raise SystemExit(f"{way.name}, turn {number_of_turn + 1}: {turn.error}")
        lines += [f"User: {said}", f"Assistant: {' '.join(''.join(turn.text).split())}"]
        turns.append(turn)
        await asyncio.sleep(given.pause)
    await client.close()
    return turns


def figures(way: Way, turns: list[Turn]) -> dict[str, Any]:
    """Of all turns after the first: the share of cached tokens, and medians of the others."""
    later = turns[1:]
    cached = [turn.cached_tokens or 0 for turn in later]
    return {
        "way": way.name,
        "prompt_tokens": [turn.prompt_tokens for turn in turns],
        "cached_tokens": [turn.cached_tokens for turn in turns],
        "share": sum(cached) / sum(turn.prompt_tokens for turn in later),
        "left_tokens": statistics.median(turn.prompt_tokens - found for turn, found in zip(later, cached, strict=True)),
        "ttft_ms": statistics.median((turn.arrivals[0] - turn.sent_at) * 1000 for turn in later),
    }


async def measure(engine: Any, given: argparse.Namespace) -> list[dict[str, Any]]:
    nonce = f"{time.time_ns() // 10**6 % 16**8:08x}"
    lent: Any = Borrowed(engine)
    found = []
    for index, way in enumerate(WAYS):
        print(way.name, file=sys.stderr, flush=True)
        sizes = {"persona_tokens": given.persona_tokens, "history_tokens": given.history_tokens}
        prompts = Prompts(1, f"{nonce}{index}", **sizes)
        variables = {"CHAT_PROMPT_FORMAT": way.format, "WARM_NEXT_TURN": "1" if way.warm else "0"}
        async with service(Engines(chat=lent, tool=None), DEPLOY_MODELS="chat", **variables) as running:
            found.append(figures(way, await talk(way, running, prompts, given)))
    return found


async def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    logs.configure(level="error", format="json", journald=False)
    engine = open_engines(Settings.load(YAP_TEXT_DEVICE="cpu", QUANTIZATION="none")).chat
    assert engine is not None
    try:
        return await measure(engine, given)
    finally:
        await engine.aclose()


def shown(found: list[dict[str, Any]]) -> str:
    rows = [("", "cached", "tokens left", "first token, ms", "last prompt")]
    rows += [
        (
            each["way"],
            f"{each['share']:.1%}",
            number(each["left_tokens"]),
            number(each["ttft_ms"]),
            str(each["prompt_tokens"][-1]),
        )
        for each in found
    ]
    return table(rows)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds in which the user listens")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--persona-tokens", type=int, default=150)
    parser.add_argument("--history-tokens", type=int, default=100)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


def main() -> None:
    given = arguments()
    found = asyncio.run(run(given))
    print(shown(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
