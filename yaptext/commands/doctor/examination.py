"""A whole examination: every check, then the report."""

from __future__ import annotations

import time

from yaptext.commands.doctor import (  # noqa: F401 each registers its checks
    capacity,
    configuration,
    gpu,
    host,
    keys,
    models,
    models_here,
    network,
    python_environment,
    report,
    service,
    units,
)
from yaptext.commands.doctor.check import Result, run_all
from yaptext.commands.doctor.deployment import Deployment
from yaptext.commands.doctor.machine import Machine


def doctor(*, as_json: bool = False, offline: bool = False, shell: bool = False, machine: Machine | None = None) -> int:
    """Prints what was found; returns 1 if a check failed. Changes nothing. `machine` is the seam for tests."""
    begun = time.monotonic()
    seen = Deployment(machine or Machine(), offline=offline, shell=shell)
    results = run_all(seen)
    show = report.as_json if as_json else report.as_text
    print(show(seen, results, time.monotonic() - begun), flush=True)
    return exit_status(results)


def exit_status(results: list[Result]) -> int:
    """1 if a check failed; a warning is none."""
    return int(any(finding.status == "fail" for _, finding in results))
