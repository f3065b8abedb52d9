"""Eight turns of a conversation on the demo model: what the next prompt's beginning, computed while the user listens,
is worth.

    YAP_TEXT_STATE_DIR=FOLDER .venv/serve-cpu/bin/python tests/bench/next_turn.py

Three ways, one after the other on one engine, in both prompt formats: warm by itself (`WARM_NEXT_TURN`), warmed by the
client with `warm_history` before each turn, and not warmed. Milliseconds are from the decision to the first token,
tokens are those of the prompt that the turn itself computed; medians of turns 2 to 8.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest.py
from conftest import talking

from yaptext.bench.text import number, table
from yaptext.dialogue import warming
from yaptext.engine.registry import open_engines
from yaptext.observe import logs
from yaptext.settings import Settings

WAYS = ("itself", "warm_history", "not")
PERSONA = {"persona_text": "You are Ann, a warm companion on a voice call. You answer in one short sentence. " * 8}
PAUSE_S = 2.0


async def turns(engine: Any, prompt_format: str, way: str) -> tuple[float, float]:
    """Median milliseconds to the first token, and tokens computed for it."""
    variables = {"CHAT_TEMPERATURE": "0", "CHAT_MAX_OUT": "60", "CHAT_PROMPT_FORMAT": prompt_format}
    variables |= {"TOOL_HARD_TIMEOUT_MS": "60000", "WARM_NEXT_TURN": "1" if way == "itself" else "0"}
    first: list[float] = []
    computed: list[int] = []
    history: list[dict[str, str]] = []
    async with talking(engine, engine, **variables) as talk:
        await warming.prime(talk.runtime)
        socket = talk.socket()
        for turn in range(1, 9):
            told: dict[str, Any] = {}
            if way == "warm_history" and history:
                socket.say("warm_history", history=history, **PERSONA)
                await socket.until("warmed", turn - 1)
                told["history"] = history
            said = f"This is turn {turn} of {way}: tell me something about the number {turn * 7}."
            socket.start(said, session_id=way + prompt_format, **PERSONA, **told)
            done = await socket.until("done", turn)
            first.append(done["timings"]["ttft_ms"] - done["timings"]["tool_ms"])
            computed.append(done["usage"]["prompt_tokens"] - done["usage"]["cached_tokens"])
            reply = socket.of("final")[-1]["normalized_text"].strip() or "..."
            history += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
            await asyncio.sleep(PAUSE_S)
    return statistics.median(first[1:]), statistics.median(computed[1:])


async def main() -> None:
    logs.configure(level="warning", format="json", journald=False)
    engine = open_engines(Settings.load(YAP_TEXT_DEVICE="cpu", QUANTIZATION="none")).chat
    rows = [("format, warm by", "first token, ms", "tokens computed", "/ warm_history")]
    try:
        for prompt_format in ("segments", "turns"):
            found = {way: await turns(engine, prompt_format, way) for way in WAYS}
            for way, (first, computed) in found.items():
                ratio = f"{first / found['warm_history'][0]:.2f}"
                rows.append((f"{prompt_format}, {way}", number(first), number(computed), ratio))
    finally:
        await engine.aclose()
    print(table(rows))


if __name__ == "__main__":
    asyncio.run(main())
