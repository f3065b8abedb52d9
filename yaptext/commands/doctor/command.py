"""`yap-text doctor`: its options; the checks are run by `examination`."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what is wrong with this machine",
        description="Checks host, card, Python environment, settings, models, keys, network, units and the service "
        "that runs, and says how many sessions fit. Changes nothing. If the units are installed, the settings are "
        "theirs. Exit status 1 if a check failed; a warning is none.",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    doctor.add_argument("--offline", action="store_true", help="do not ask the hub")
    doctor.add_argument("--shell", action="store_true", help="the settings of this shell, not of the units")
    doctor.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from yaptext.commands.doctor.examination import doctor

    return doctor(as_json=parsed.json, offline=parsed.offline, shell=parsed.shell)
