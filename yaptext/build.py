"""Which code runs: the release, and the commit it was built from.

- A checkout, which is what an editable install runs from, asks git, once in a process.
- The Nix flake writes the commit that it builds into `yaptext/commit.txt` (nix/python-env.nix).
- A wheel has neither: its commit is unknown.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

RELEASE = "0.1.0"
GIT_WITHIN_S = 2.0
_COMMIT = re.compile(r"([0-9a-f]{40,64})(-dirty)?")
"""What `git describe` prints, and what a flake calls its `rev` or `dirtyRev`."""
_SHORT = 7


class Build(NamedTuple):
    """`version` is `0.1.0+g1234abc`, with `.dirty` at its end if tracked files differ from the commit; `0.1.0` if the
    commit is unknown. `commit` is the full hash, or None."""

    version: str
    commit: str | None


@cache
def build() -> Build:
    """Of this process. Never fails."""
    return find(Path(__file__).parent)


def find(package: Path) -> Build:
    """Of the package in a folder."""
    found = _COMMIT.fullmatch(_packaged(package) or _checked_out(package.parent))
    if found is None:
        return Build(RELEASE, None)
    commit, dirty = found.groups()
    return Build(f"{RELEASE}+g{commit[:_SHORT]}{'.dirty' if dirty else ''}", commit)


def _packaged(package: Path) -> str:
    try:
        return (package / "commit.txt").read_text(errors="replace").strip()
    except OSError:
        return ""


def _checked_out(root: Path) -> str:
    """What git says of the repository of exactly this folder. It is named to git: found by git itself, it would have to
    belong to the user that the service runs as."""
    if not (root / ".git").exists():
        return ""
    command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "-c", "core.fsmonitor=false"]
    command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=GIT_WITHIN_S,
            check=False,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):  # no git, or one that waits for a disk
        return ""
    return said.stdout.decode(errors="replace").strip()
