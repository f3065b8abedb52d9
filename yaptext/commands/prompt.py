"""`yap-text prompt`: its options; `sent_prompt` makes the prompt."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from yaptext.settings import Settings


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prompt = commands.add_parser(
        "prompt",
        help="show the prompts that models get",
        description="Prints the prompt that each model gets, with its control tokens, and its parts. No engine is "
        "started. Settings such as CHAT_THINKING apply. Exit status 1 if a model cannot be used.",
    )
    prompt.add_argument("models", nargs="+", metavar="MODEL", help="a folder or hub id")
    prompt.add_argument("--role", choices=("chat", "tool"), default="chat", help="default: chat")
    prompt.add_argument("--format", choices=("segments", "turns", "bare"), help="default: CHAT_PROMPT_FORMAT")
    prompt.add_argument("--persona-style", metavar="STYLE", help="default: DEFAULT_PERSONA_STYLE")
    prompt.add_argument(
        "--history", metavar="FILE", type=Path, help="a transcript whose lines begin with User: and Assistant:"
    )
    prompt.add_argument("--tools", metavar="FILE", type=Path, help="default: TOOLS_FILE")
    prompt.add_argument("--utterance", metavar="TEXT", default="Hello!", help="default: Hello!")
    prompt.add_argument("--json", action="store_true", help="one JSON object per model, one per line")
    prompt.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from yaptext.commands.sent_prompt import Options, prompt

    options = Options(
        role=parsed.role,
        format=parsed.format,
        persona_style=parsed.persona_style,
        history=parsed.history,
        tools=parsed.tools,
        utterance=parsed.utterance,
        as_json=parsed.json,
    )
    logging.disable(logging.WARNING)  # of the hub client and transformers, about files that many models lack
    try:
        return prompt(Settings.load(), parsed.models, options)
    finally:
        logging.disable(logging.NOTSET)
