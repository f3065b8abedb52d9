"""A conversation in the terminal. Ctrl-C interrupts a reply, Ctrl-D or /quit ends the program."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from yaptext.client import ConnectionLost, Done, Event, ServiceError, Token, ToolCall, Turn, connect
from yaptext.client.fields import TurnFields
from yaptext.wire.frames import IdentifiedCall, Timings, Usage

_HELP = "/style NAME  /gender woman|man  /persona TEXT  /quit.  Ctrl-C stops the reply, or leaves when there is none."


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools: `given` replaces those of the service. `command` is run for each call: it gets the call as JSON on its
    standard input, and prints the result. `ask` lets the user type the result."""

    given: list[Any] | None = None
    command: str | None = None
    ask: bool = False


async def chat(
    url: str,
    key: str,
    *,
    session: str | None,
    persona: dict[str, str],
    tools: Tools = Tools(),  # frozen
) -> int:
    async with connect(url, key, session_id=session) as yap:
        screen = _Screen(sys.stdout.isatty())
        screen.note(f"Connected to {url}. {_HELP}")
        changes: dict[str, Any] = dict(persona)
        if tools.given is not None:
            changes["tools"] = tools.given
        waits = {"await_tools": True} if tools.command or tools.ask else {}
        while True:
            try:
                line = await _read_line(screen.prompt)
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if line == "/quit":
                return 0
            if line.startswith("/"):
                changes.update(_command(line, screen))
            elif line:
                fields = cast(TurnFields, changes | waits)
                try:
                    turn = await yap.turn(line, **fields).begin()
                    changes = {}
                    await _show_turn(turn, screen)
                    while turn.calls:
                        results = {call.id: await _result(call, tools) for call in turn.calls}
                        turn = await yap.tool_result(turn, results)
                        await _show_turn(turn, screen)
                except (ServiceError, ConnectionLost) as error:
                    screen.fail(error)


def _command(line: str, screen: _Screen) -> dict[str, str]:
    name, _, value = line[1:].partition(" ")
    field = {"style": "persona_style", "gender": "assistant_gender", "persona": "persona_text"}.get(name)
    if field is None or not value:
        screen.note(_HELP)
        return {}
    screen.note("from the next message on")
    return {field: value}


async def _read_line(prompt: str) -> str:
    """One line of input. While it waits, Ctrl-C raises KeyboardInterrupt, as a prompt does."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str] = loop.create_future()

    def settle(text: str) -> None:
        if line.done():
            return
        if text:
            line.set_result(text.strip())
        else:
            line.set_exception(EOFError())

    def interrupt() -> None:
        if not line.done():
            line.set_exception(KeyboardInterrupt())

    print(prompt, end="", flush=True)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        # A plain file or an ended pipe cannot be watched by every loop: a thread reads them all.
        reader = loop.run_in_executor(None, sys.stdin.readline)
        reader.add_done_callback(lambda done: None if done.cancelled() else settle(done.result()))
        return await line
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _result(call: IdentifiedCall, tools: Tools) -> str:
    """The result of a call."""
    if tools.command is None:
        try:
            return await _read_line(f"{call.name}({json.dumps(call.arguments)}) returns> ")
        except (EOFError, KeyboardInterrupt):
            return "The user did not answer."
    process = await asyncio.create_subprocess_shell(tools.command, stdin=PIPE, stdout=PIPE)
    told, _ = await process.communicate(json.dumps(msgspec.to_builtins(call)).encode())
    text = told.decode(errors="replace").strip()
    return text if process.returncode == 0 else f"The tool failed with status {process.returncode}. {text}".strip()


async def _show_turn(turn: Turn, screen: _Screen) -> None:
    loop = asyncio.get_running_loop()
    cancels: set[asyncio.Task[None]] = set()

    def barge_in() -> None:
        cancels.add(loop.create_task(turn.cancel()))

    loop.add_signal_handler(signal.SIGINT, barge_in)
    try:
        async for event in turn:
            screen.show(event)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if cancels:
            await asyncio.gather(*cancels)


class _Screen:
    def __init__(self, color: bool) -> None:
        self._dim, self._bold, self._off = ("\033[2m", "\033[1m", "\033[0m") if color else ("", "", "")
        self.prompt = f"{self._bold}you>{self._off} "

    def note(self, text: str) -> None:
        print(f"{self._dim}{text}{self._off}", flush=True)

    def show(self, event: Event) -> None:
        match event:
            case ToolCall():
                calls = ", ".join(f"{call.name}({call.arguments})" for call in event.raw)
                reason = f", {event.reason}" if event.reason else ""
                self.note(f"[tool: {calls or 'none'}, {event.tool_ms:.0f} ms{reason}]")
            case Token():
                print(event.text, end="", flush=True)
            case Done(finish_reason="tool_calls"):
                pass
            case Done(cancelled=True):
                print()
                self.note(f"[cancelled after {event.tokens_sent} tokens, in {event.cancel_ms:.1f} ms]")
            case Done(usage=Usage() as usage, timings=Timings() as timings):
                print()
                self.note(
                    f"[first token {timings.ttft_ms} ms, {usage.completion_tokens} tokens in "
                    f"{timings.total_ms} ms, {usage.cached_tokens}/{usage.prompt_tokens} cached]"
                )

    def fail(self, error: ServiceError | ConnectionLost) -> None:
        print()
        self.note(f"[{error.code}: {error.message}]")
