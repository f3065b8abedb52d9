"""`yap-text chat`: its options; the conversation itself is `terminal`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from yaptext.commands import client_options
from yaptext.errors import SettingsError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser("chat", help="talk to a running service")
    client_options.add_options(chat)
    chat.add_argument("--tools", metavar="FILE", type=Path, help="JSON list of tools, instead of the service's own")
    chat.add_argument("--await-tools", action="store_true", help="ask for the result of each call")
    chat.add_argument(
        "--tool-command",
        metavar="COMMAND",
        help="run for each call: it gets the call as JSON, and prints the result",
    )
    chat.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    import asyncio

    from yaptext.commands.terminal import Tools, chat

    url, key = client_options.address(parsed)
    try:
        given = json.loads(parsed.tools.read_text(encoding="utf-8")) if parsed.tools else None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--tools {parsed.tools} cannot be read: {error}") from None
    tools = Tools(given, parsed.tool_command, parsed.await_tools)
    return asyncio.run(chat(url, key, session=parsed.session, persona=client_options.persona(parsed), tools=tools))
