"""`yap-text doctor`: its options; the checks are run by `examination`."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check this machine and say what is wrong",
        description="Checks host, card, Python environment, settings, models, keys, network, units and the service "
        "that runs, and estimates how many sessions fit. Changes nothing. If the units are installed, their settings "
        "are checked. Exit status 1 if a check failed; warnings do not count.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--offline", action="store_true", help="do not ask the hub")
    doctor.add_argument("--shell", action="store_true", help="check the settings of this shell, not of the units")
    doctor.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from yaptext.commands.doctor.examination import doctor

    return doctor(as_json=parsed.json, offline=parsed.offline, shell=parsed.shell)
