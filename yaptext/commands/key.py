"""`yap-text key`: makes API keys."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from yaptext.settings import Settings


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    key = commands.add_parser("key", help="make API keys").add_subparsers(required=True, metavar="COMMAND")
    new = key.add_parser(
        "new",
        help="print a new key, and add its hash to the key file",
        description="Prints a new key on stdout, this once, and adds a line with its hash to the key file. Without a "
        "file the line is printed on stderr.",
    )
    new.add_argument("name", metavar="NAME", help="name in the logs: letters, digits, '.', '_' and '-'")
    new.add_argument("--file", metavar="PATH", type=Path, help="the key file (default: YAP_TEXT_KEY_FILE)")
    new.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from yaptext.server.access import keyfile

    path = parsed.file or Settings.load().key_file
    key, line = keyfile.add(parsed.name, path)
    told = f"added to {path}; SIGHUP makes a running service read it" if path else f"the line for the key file: {line}"
    print(f"yap-text: {told}", file=sys.stderr)
    print(key)
    return 0
