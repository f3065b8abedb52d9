"""`yap-text sessions`: its options; `session_backup` does the work."""

from __future__ import annotations

import argparse
from pathlib import Path

from yaptext.settings import Settings


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sessions = commands.add_parser(
        "sessions",
        help="show, back up or restore the session file",
        description="Shows the session file of SESSION_STORE: number of sessions, bytes, oldest and latest use. The "
        "service may run.",
    )
    sessions.set_defaults(command=run, action="show")
    actions = sessions.add_subparsers(metavar="COMMAND")
    backup = actions.add_parser(
        "backup",
        help="copy the sessions into a new file",
        description="Copies every session into a new file of mode 0600. The service may run. Sessions that are sealed "
        "with SESSION_STORE_KEY stay sealed.",
    )
    restore = actions.add_parser(
        "restore",
        help="restore the sessions of a backup",
        description="Restores the sessions of a backup. The service must be stopped. The previous session file is kept "
        "beside the new one.",
    )
    for name, action in (("backup", backup), ("restore", restore)):
        action.add_argument("file", metavar="FILE", type=Path)
        action.set_defaults(action=name)


def run(parsed: argparse.Namespace) -> int:
    from yaptext.commands import session_backup

    settings = Settings.load()
    if parsed.action == "backup":
        return session_backup.back_up(settings, parsed.file)
    if parsed.action == "restore":
        return session_backup.restore(settings, parsed.file)
    return session_backup.show(settings)
