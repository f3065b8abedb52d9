"""`yap-text warmup`: one turn from outside, its figures and its text as JSON."""

from __future__ import annotations

import argparse
import json
import time
import uuid
from typing import Any

from yaptext.commands import client_options


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    warmup = commands.add_parser("warmup", help="run one turn and print its figures and text as JSON")
    warmup.add_argument("message", nargs="?", default="Who was Alan Turing?")
    warmup.add_argument("--history", metavar="TEXT", help="a transcript whose lines begin with User: and Assistant:")
    client_options.add_options(warmup)
    warmup.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    import asyncio

    url, key = client_options.address(parsed)
    return asyncio.run(
        _warmup(
            url,
            key,
            parsed.message,
            session=parsed.session,
            history=parsed.history,
            persona=client_options.persona(parsed),
        )
    )


async def _warmup(
    url: str, key: str, message: str, *, session: str | None, history: str | None, persona: dict[str, str]
) -> int:
    """Prints a line of figures (milliseconds as a client sees them) and a line with decision and text.
    Returns 0, or 1 if the turn ended in an error."""
    from yaptext.client.client import connect

    fields: dict[str, Any] = dict(persona)
    if history is not None:
        fields["history_text"] = history.replace("\\n", "\n")
    figures: dict[str, Any] = {}
    result: dict[str, Any] = {}
    async with connect(url, key) as client:
        begun = time.perf_counter()

        def mark(name: str) -> None:
            figures.setdefault(name, round((time.perf_counter() - begun) * 1000, 2))

        await client.send("start", session_id=session or uuid.uuid4().hex, user_utterance=message, **fields)
        async for frame in client.turn():
            match frame["type"]:
                case "ack":
                    mark("ack_ms")
                case "toolcall":
                    mark("decision_ms")
                    result["toolcall"] = {"status": frame["status"], "raw": frame["raw"]}
                case "token":
                    mark("ttft_ms")
                case "final":
                    result["text"] = frame["normalized_text"]
                case "done":
                    mark("total_ms")
                    figures["usage"], figures["server"] = frame["usage"], frame["timings"]
                case "error":
                    result["error"] = {"code": frame["error_code"], "message": frame["message"]}
    if figures.get("total_ms") and figures.get("ttft_ms"):
        seconds = (figures["total_ms"] - figures["ttft_ms"]) / 1000
        tokens = figures["usage"]["completion_tokens"]
        figures["tokens_per_s"] = round((tokens - 1) / seconds, 1) if seconds > 0 and tokens > 1 else None
    print(json.dumps({"metrics": figures}))
    print(json.dumps(result, ensure_ascii=False))
    return 1 if "error" in result else 0
