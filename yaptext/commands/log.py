"""`yap-text log SESSION`: explains from the service's log why a user's turns were slow."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from yaptext.errors import SettingsError
from yaptext.settings import Settings

UNIT = "yap-text"
_SLOW_MS = 1500
"""From `start` to the first token: the time that a voice loop leaves to the model, twice a human pause."""
_SMALL_MS = 20
"""Shorter parts of a turn are not reported."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    log = commands.add_parser(
        "log",
        help="explain why a user's turns were slow",
        description="Explains why the turns of a session were slow, from the journal of the unit yap-text, or "
        "from the file that YAP_TEXT_LOG_FILE names.",
    )
    log.add_argument("session", metavar="SESSION", help="session_id")
    log.add_argument("--file", metavar="LOG", type=Path, help="the log to read (default: YAP_TEXT_LOG_FILE)")
    log.add_argument("--turns", metavar="N", type=int, default=20, help="number of latest turns (default 20)")
    log.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    return log(parsed.session, file=parsed.file or Settings.load().log_file, turns=max(1, parsed.turns))


def log(session: str, *, file: Path | None, turns: int) -> int:
    """Prints the last `turns` turns of a session, from `file` or the journal of the unit; 1 if there are none. Raises
    `SettingsError` for a log that cannot be read."""
    found = list(_of(session, _events(_lines(file))))
    for event in found[-turns:]:
        print(line_of(event))
        for reason in reasons_of(event):
            print(f"    {reason}")
    if not found:
        print(f"No turn of the session {session!r} in {file or f'the journal of {UNIT}'}.")
    return 0 if found else 1


def _lines(file: Path | None) -> Iterator[str]:
    if file is not None:
        try:
            with file.open(encoding="utf-8", errors="replace") as lines:
                yield from lines
        except OSError as error:
            raise SettingsError(f"--file {file} cannot be read: {error.strerror}") from None
        return
    command = ["journalctl", "--unit", UNIT, "--output", "cat", "--no-pager"]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as journal:
            assert journal.stdout is not None
            yield from journal.stdout
    except FileNotFoundError:
        raise SettingsError("there is no journalctl on this machine: name the log with --file") from None


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        start = line.find("{")
        if start < 0:
            continue
        try:
            event = json.loads(line[start:])
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _of(session: str, events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (event for event in events if event.get("event") == "turn.finished" and event.get("session_id") == session)


def line_of(event: dict[str, Any]) -> str:
    """One turn: when, how it ended, and how long a user waited."""
    first = event.get("ttft_ms")
    waited = "no token came" if first is None else f"first token after {_ms(first)}"
    ended = event.get("outcome", "?")
    if event.get("finish_reason") not in (None, "stop"):
        ended += f" ({event['finish_reason']})"
    when, turn, whole = event.get("timestamp", "?"), event.get("turn", "?"), _ms(event.get("total_ms"))
    return f"{when}  turn {turn}: {ended}, {waited}, {whole} in all"


def reasons_of(event: dict[str, Any]) -> list[str]:
    """The parts of the time to the first token, longest first; nothing for a fast turn."""
    first, queue, tool = (event.get(name) or 0.0 for name in ("ttft_ms", "queue_ms", "tool_ms"))
    reply = max(0.0, first - queue - tool)
    prompt, cached = event.get("prompt_tokens") or 0, event.get("cached_tokens") or 0
    computed = prompt - cached
    shares = [
        (queue, f"{_ms(queue)} until an engine was asked: the previous turn had to end first, or the text was long"),
        (tool, f"{_ms(tool)} for the decision{_of_decision(event)}"),
        (reply, f"{_ms(reply)} from the decision to the first token: {computed} of {prompt} prompt tokens computed"),
    ]
    found = [text for share, text in sorted(shares, reverse=True) if share >= _SMALL_MS]
    if prompt and cached < prompt / 2 and prompt - cached > 256:
        found.append(
            f"only {cached} prompt tokens were in the cache: a new persona or history, one that was trimmed, or a "
            "cache that is too small (warm_history computes it before the user speaks)"
        )
    if event.get("tool_reason") in ("timeout", "engine_failed", "invalid", "truncated"):
        found.append(f"there was no decision: {event['tool_reason']}")
    if others := event.get("others"):
        found.append(f"{others} other turns ran at its start")
    if (backlog := event.get("backlog_ms") or 0) >= _SMALL_MS:
        found.append(f"prompts of {_ms(backlog)} were waiting for their first token")
    if event.get("outcome") == "finished" and first < _SLOW_MS and not event.get("tool_reason"):
        return found[:1]
    return found


def _of_decision(event: dict[str, Any]) -> str:
    prompt, cached = event.get("tool_prompt_tokens") or 0, event.get("tool_cached_tokens") or 0
    return f" ({prompt - cached} of {prompt} prompt tokens computed)" if prompt else ""


def _ms(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.0f} ms"
