"""What a script says to its test: one JSON object a line. Also what every script asks the service."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

BASE_URL = os.environ["OPENAI_BASE_URL"]
KEY = os.environ["OPENAI_API_KEY"]
INSTRUCTIONS = "You are a friendly companion. Answer in one short sentence. " + " ".join(
    f"Rule {number}: say nothing about the number {number}, unless the user speaks about it first."
    for number in range(1, 9)
)
"""More than one block of the prefix cache."""
SAID = ("What is the capital of France?", "And what do people eat there?")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
OSLO = "What is the weather in Oslo?"
RESULT = "Sunny, 21 degrees."
LONG = "Tell me a very long story about the sea."
MOST = 24
"""Tokens of a reply."""


def tell(what: str, **fields: Any) -> None:
    print(json.dumps({"what": what, "at_s": round(time.monotonic(), 3), **fields}, default=str), flush=True)


def ask(text: str) -> str:
    """Gives the text back."""
    tell("asked", said=text)
    return text


def tell_error(error: BaseException) -> None:
    """Its class, as the client's users catch it."""
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    tell("error", kinds=kinds, status=getattr(error, "status_code", None), text=str(error)[:500])


def wait_for_test() -> None:
    """Until the test has looked at the service."""
    sys.stdin.readline()


def run(scenarios: Mapping[str, Any]) -> None:
    """Runs the scenario that the command line names."""
    ended = scenarios[sys.argv[1]]()
    if inspect.isawaitable(ended):

        async def whole() -> None:
            await ended

        asyncio.run(whole())
    tell("end")
