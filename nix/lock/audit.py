"""Ask a vulnerability service about every package that the locks pin.

    python nix/lock/audit.py [OPTION ...]    of pip-audit, for example: --ignore-vuln ID, -s osv

A line for each known vulnerability. Exit status: 0 none is known, 1 some are, 75 the service could not be asked, or
not about every package: a mirror without the registry's feed of vulnerabilities knows none, which is no clean audit.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from lock import ROOT, Wheel, parse

COULD_NOT_ASK = 75


class CouldNotAsk(Exception):
    """pip-audit gave no report; the message is its own."""


def requirements(wheels: Sequence[Wheel]) -> str:
    """What pip-audit reads. A local build counts as the release that it is built of: no advisory names 2.13.0+cpu."""
    return "".join(f"{wheel.name}=={wheel.version.partition('+')[0]}\n" for wheel in wheels)


def ask(wheels: Sequence[Wheel], options: Sequence[str]) -> list[dict[str, Any]]:
    """pip-audit's report: a package each, with "version" and "vulns", or with a "skip_reason"."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements(wheels))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner=off"]
        ended = subprocess.run(
            [*command, "--format=json", "-r", file.name, *options], capture_output=True, text=True, check=False
        )
    try:
        found: list[dict[str, Any]] = json.loads(ended.stdout)["dependencies"]
    except ValueError:  # its status is 1 for vulnerabilities and for everything that goes wrong
        raise CouldNotAsk((ended.stderr.strip() or "pip-audit said nothing").splitlines()[-1]) from None
    if all("skip_reason" in package for package in found):
        raise CouldNotAsk("it knows none of them")
    return found


def main(options: Sequence[str]) -> int:
    known = unknown = 0
    for path in sorted((ROOT / "nix" / "lock").glob("*.txt")):
        try:
            found = ask(parse(path.read_text()).wheels, options)
        except CouldNotAsk as error:
            print(f"audit: the service could not be asked about the packages of {path.stem}: {error}", file=sys.stderr)
            return COULD_NOT_ASK
        for package in found:
            if "skip_reason" in package:
                unknown += 1
                print(f"{path.stem}: {package['name']}: the service does not know it", file=sys.stderr)
            for vulnerability in package.get("vulns", ()):
                known += 1
                names = ", ".join([vulnerability["id"], *vulnerability["aliases"]])
                fixed = ", ".join(vulnerability["fix_versions"]) or "no release"
                print(f"{path.stem}: {package['name']} {package['version']}: {names}; fixed in {fixed}")
        print(f"{path.stem}: asked about {len(found)} packages", file=sys.stderr)
    return 1 if known else COULD_NOT_ASK if unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
