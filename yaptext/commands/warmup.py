"""`yap-text warmup`: one turn from outside, its figures and its text as JSON."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any, cast

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
    import msgspec

    from yaptext.client import Ack, Done, Final, ServiceError, Token, ToolCall, connect
    from yaptext.client.fields import TurnFields

    fields = cast(TurnFields, dict(persona))
    if history is not None:
        fields["history"] = history.replace("\\n", "\n")
    figures: dict[str, Any] = {}
    result: dict[str, Any] = {}
    try:
        async with connect(url, key, session_id=session, reconnect=False) as yap:
            begun = time.perf_counter()

            def mark(name: str) -> None:
                figures.setdefault(name, round((time.perf_counter() - begun) * 1000, 2))

            async with yap.turn(message, **fields) as turn:
                async for event in turn:
                    match event:
                        case Ack():
                            mark("ack_ms")
                        case ToolCall():
                            mark("decision_ms")
                            result["toolcall"] = {"status": event.status, "raw": msgspec.to_builtins(event.raw)}
                        case Token():
                            mark("ttft_ms")
                        case Final():
                            result["text"] = event.normalized_text
                        case Done():
                            mark("total_ms")
                            figures["usage"] = msgspec.to_builtins(event.usage)
                            figures["server"] = msgspec.to_builtins(event.timings)
    except ServiceError as error:
        result["error"] = {"code": error.code, "message": error.message}
    if figures.get("total_ms") and figures.get("ttft_ms"):
        seconds = (figures["total_ms"] - figures["ttft_ms"]) / 1000
        tokens = figures["usage"]["completion_tokens"]
        figures["tokens_per_s"] = round((tokens - 1) / seconds, 1) if seconds > 0 and tokens > 1 else None
    print(json.dumps({"metrics": figures}))
    print(json.dumps(result, ensure_ascii=False))
    return 1 if "error" in result else 0
