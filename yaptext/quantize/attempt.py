"""The manifest of a failed attempt: beside the results of its model, so that no later run does the same work in vain.

`STATE/awq/NAME-HASH/failed.json` says what was to be made, of which source, by which code, and why it failed. It
appears by one rename, and goes when another attempt begins. Only failures that would come again are written down.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import structlog

import yaptext
from yaptext.engine import awq_results
from yaptext.engine.awq_results import FAILED, FailedAttempt
from yaptext.engine.hub_client import is_unit
from yaptext.errors import QuantizeError, QuantizeRefused
from yaptext.quantize import compressor
from yaptext.quantize.kept import TEMPLATES
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)
_PARTIAL = f".{FAILED}"
_LIBRARIES = ("autoawq", "torch", "transformers")


def remember(row: Path, wanted: dict[str, Any], error: QuantizeError) -> None:
    """Writes down that `wanted` failed with `error`. If that is impossible, the log says so and the next run tries
    again: the error itself matters more."""
    source = wanted["source"]
    if source["revision"] is None and source["content"] is None:
        return  # what was not seen cannot be recognised
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    attempt = FailedAttempt(wanted, str(error), error.exit_status, now)
    try:
        with (row / _PARTIAL).open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(attempt), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        (row / _PARTIAL).rename(row / FAILED)
    except OSError as failure:
        _log.warning("quantize.failure_not_noted", file=str(row / FAILED), error=str(failure))


def forget(row: Path) -> None:
    """Deletes the manifest, and what a killed job may have left of one."""
    for name in (FAILED, _PARTIAL):
        with suppress(OSError):
            (row / name).unlink()


def is_same(failed: FailedAttempt, wanted: dict[str, Any]) -> bool:
    """Whether a job for `wanted` would only repeat `failed`. Our version does not count: it names the commit only if
    git answered in time, and `code` says more."""

    def identity(wanted: dict[str, Any]) -> dict[str, Any]:
        return wanted | {"made_by": dict(wanted.get("made_by") or {}) | {"yaptext": None}}

    return identity(failed.wanted) == identity(wanted)


def repeated(settings: Settings, source: str, name: str, failed: FailedAttempt) -> QuantizeError:
    """The error of a job that would only repeat `failed`, with its exit status. `name` is the model's for people."""
    again = "yap-text quantize --again"
    if is_unit(settings):  # by hand it would look into the state folder of another user
        again = f"rm {awq_results.row(settings.state, source) / FAILED} && systemctl restart yap-text"
    kind = QuantizeRefused if failed.exit_status == QuantizeRefused.exit_status else QuantizeError
    return kind(
        f"quantizing {name} failed at {failed.failed_at}, and no setting, model file or code has changed since: "
        f"{failed.reason}. To try again: {again}"
    )


def made_by(*, on_cuda: bool) -> dict[str, str | None]:
    """The code that makes a result, by version; `code` is 16 hex digits over our own, which may change in between."""
    versions: dict[str, str | None] = {"yaptext": yaptext.__version__, "code": _code()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions | {"llmcompressor": compressor.VERSION, "device": "cuda" if on_cuda else "cpu"}


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(yaptext.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def files(source: str) -> str | None:
    """A digest of the files of a folder, 16 hex digits: a tokenizer may have been corrected while the weights stayed.
    None for a model of the hub, whose revision is enough."""
    if not awq_results.is_folder(source):
        return None
    digest = hashlib.sha256()
    for file in [*sorted(Path(source).iterdir()), *sorted((Path(source) / TEMPLATES).glob("*"))]:
        with suppress(OSError):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
