"""The shelf: AWQ folders that the quantizer finished, one model a row, and where the server finds them.

`STATE/awq/NAME-HASH/TIME/` is one result; it appears there whole, by a rename, with its manifest inside. The newest one
counts. What begins with a dot is somebody's unfinished work.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "awq_metadata.json"
"""What was made of what and how, the verification, and every other file with its size and sha256."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One result: its folder, and its manifest as read."""

    folder: Path
    manifest: dict[str, Any]


def row(state: Path, source: str) -> Path:
    """The folder under which all results of one float model lie. `source` is a hub id or a local folder."""
    if Path(source).is_absolute() or Path(source).is_dir():
        source = str(Path(source).resolve())
        name = Path(source).name
    else:
        name = source.replace("/", "--")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-80:].lstrip(".-") or "model"
    return state / "awq" / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def finished(state: Path, source: str) -> Finished | None:
    """The newest whole result for `source`, or None. A file that is missing or has another size than its manifest
    says makes a result count as none."""
    for folder in sorted(row(state, source).glob("[0-9]*"), reverse=True):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
            if all((folder / name).stat().st_size == size for name, size in sizes.items()):
                return Finished(folder, manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not ours, or damaged: the next older one may be whole
    return None
