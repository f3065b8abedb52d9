"""The options of the commands that talk to a running service."""

from __future__ import annotations

import argparse

from yaptext.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="address of the service (default: ws://HOST:PORT/ws of the environment)")
    parser.add_argument("--gender", choices=("woman", "man"), help="assistant_gender")
    parser.add_argument("--style", help="persona_style")
    parser.add_argument("--identity", choices=("woman", "man", "non-binary"), help="user_identity")
    parser.add_argument("--session", help="session_id (default: a new one)")


def address(parsed: argparse.Namespace) -> tuple[str, str]:
    settings = Settings.load()
    return parsed.url or f"ws://{settings.host}:{settings.port}/ws", settings.api_key.get_secret_value()


def persona(parsed: argparse.Namespace) -> dict[str, str]:
    fields = {
        "assistant_gender": parsed.gender,
        "persona_style": parsed.style,
        "user_identity": parsed.identity,
    }
    return {name: value for name, value in fields.items() if value}
