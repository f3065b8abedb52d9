"""`yap-text install`: its options; the steps are `installation`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    install = commands.add_parser("install", help="install or remove the systemd units")
    install.add_argument("--prefix", metavar="DIR", type=Path, help="write below DIR and run no systemctl")
    install.add_argument("--command", metavar="PATH", type=Path, dest="program", help="what the units run")
    instead = install.add_mutually_exclusive_group()
    instead.add_argument("--rollback", action="store_true", help="return to the previous version and its units")
    instead.add_argument("--uninstall", action="store_true", help="stop the service and remove what was installed")
    install.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from yaptext.commands.install.installation import install, rollback, uninstall

    if parsed.rollback:
        return rollback(parsed.prefix)
    return uninstall(parsed.prefix) if parsed.uninstall else install(parsed.prefix, parsed.program)
