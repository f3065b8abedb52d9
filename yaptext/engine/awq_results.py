"""What the quantizer made of each float model: finished AWQ folders, or why there are none.

`STATE/awq/NAME-HASH/` is the row of a model, `TIME/` in it one result; it appears there whole, by a rename, with its
manifest inside. The newest one is used. A name with a leading dot is an unfinished result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MANIFEST = "awq_metadata.json"
"""What was made of what and how, the verification, and every other file with its size and sha256."""
FAILED = "failed.json"
"""In the row of a model: the quantizer's last attempt, if it failed."""
_RESULTS = "[0-9]*"
_PIECES, _PIECE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class Finished:
    """One result: its folder, and its manifest as read."""

    folder: Path
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """What the quantizer could not make. `wanted` is what was to be made, of which source and by which code;
    `failed_at` is UTC (ISO 8601)."""

    wanted: dict[str, Any]
    reason: str
    exit_status: int
    failed_at: str


def row(state: Path, source: str) -> Path:
    """The folder under which all results of one float model lie. `source` is a hub id or a local folder."""
    if Path(source).is_absolute() or is_folder(source):
        source = str(Path(source).resolve())
        name = Path(source).name
    else:
        name = source.replace("/", "--")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-80:].lstrip(".-") or "model"
    return state / "awq" / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def is_folder(source: str) -> bool:
    """False also for a folder that this process may not look at: `Path.is_dir` raises there."""
    return os.path.isdir(source)


def finished(state: Path, source: str) -> Finished | None:
    """The newest whole result for `source`, or None. A file that is missing or has another size than its manifest
    says makes a result count as none, as do other weights in the folder that it was made of."""
    now = content(Path(source)) if is_folder(source) else None
    for folder in sorted(row(state, source).glob(_RESULTS), reverse=True):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
            then = manifest.get("source", {}).get("content")
            whole = sizes and all((folder / name).stat().st_size == size for name, size in sizes.items())
            if whole and (then == now or None in (then, now)):
                return Finished(folder, manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not ours, or damaged: the next older one may be whole
    return None


def failed_attempt(state: Path, source: str) -> FailedAttempt | None:
    """Why there are no AWQ weights of the float model `source`, if the quantizer wrote it down. An attempt at other
    weights in the same folder does not count, nor does a file that cannot be read."""
    try:
        note = json.loads((row(state, source) / FAILED).read_text(encoding="utf-8"))
        wanted, reason, status = note["wanted"], note["reason"], note["exit_status"]
        found = FailedAttempt(wanted, str(reason), int(status), str(note["failed_at"]))
        then = wanted["source"]["content"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if not is_folder(source) or then == content(Path(source)) else None


def next_result(row: Path) -> Path:
    """Where a result goes that is to be the newest of its row: by the time, and behind the newest there is even where
    the clock was set back in between."""
    name = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    newest = max((folder.name for folder in row.glob(_RESULTS)), default="")
    return row / (name if name > newest else f"{newest}.1")


def content(folder: Path) -> str | None:
    """A float model's weights and config in a word: 16 hex digits over pieces from all over its files, so that a start
    need not read gigabytes. None where they cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            with file.open("rb") as opened:
                size = file.stat().st_size
                digest.update(f"{file.name} {size}\n".encode())
                for place in range(0, size, max(_PIECE_BYTES, size // _PIECES)):
                    opened.seek(place)
                    digest.update(opened.read(_PIECE_BYTES))
    except OSError:
        return None
    return digest.hexdigest()[:16]
