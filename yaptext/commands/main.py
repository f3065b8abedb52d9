"""From a command line to an exit status. A command imports heavy modules when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from yaptext import __version__
from yaptext.commands import bench, chat, failures, key, log, prompt, quantize, serve, sessions, warmup
from yaptext.commands.doctor import command as doctor
from yaptext.commands.install import command as install
from yaptext.errors import SettingsError, StartError, YapError
from yaptext.settings.hidden import hidden_paths

COMMANDS = (serve, quantize, chat, warmup, prompt, sessions, log, doctor, bench, key, install)
"""In the order of the help. `add` declares the arguments of one, `run` executes it, and returns the exit status."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status: 2 if something must be corrected, wrong arguments included, 75 if
    the error may pass by itself, 1 for any other failure. A known error is one line on stderr per fault; for a
    service it is one event in the log."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except YapError as error:
        lines = str(error).splitlines()
        if parsed.command in (serve.run, quantize.run) and not sys.stderr.isatty():  # run by a unit, not by a person
            lines += hidden_paths(str(error))
        if parsed.command is serve.run:
            more = failures.of_doctor() if isinstance(error, SettingsError | StartError) else None
            failures.tell_operator(lines, error.exit_status, more=more)
        elif parsed.command is quantize.run:
            failures.tell_operator(lines, error.exit_status, "quantize.failed", "Quantizing failed")
        else:
            failures.tell(lines)
        return error.exit_status
    except KeyboardInterrupt:
        if parsed.command is quantize.run:
            failures.tell_of_interrupt()
        return 130
    except Exception as error:  # the log has its traceback
        from yaptext.observe.systemd import notify

        notify(f"STATUS=It crashed: {type(error).__name__}")
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="yap-text", description="Real-time text inference for voice companions.")
    parser.add_argument("--version", action="version", version=f"yap-text {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
