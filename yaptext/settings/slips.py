"""Misspelt names: variables that look like settings and are not."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from yaptext.settings.old_names import RENAMED
from yaptext.settings.table import Table

_GONE = {
    "WARMUP_ON_START": "every start is warmed",
    "PREFETCH_CHAT": "models are fetched at the start",
    "NUKE_ALL": "systemd stops and restarts the service",
    "STREAM_RATE_TOKS_PER_S": "tokens are sent as they come",
}
_INTERNAL = {"YAP_TEXT_ENGINE_FAULT", "YAP_TEXT_TEST_STATE", "TOOL_TIMEOUT_S"}
_OURS = ("CHAT_", "TOOL_", "AWQ_", "HF_AWQ_", "YAP_TEXT_")
_NEAR = 0.85


def unknown_names(environ: Mapping[str, str] | None = None) -> list[str]:
    """One note for each variable that looks like ours and is not: a misspelt one would otherwise be
    ignored silently. `environ` defaults to the process's own."""
    environ = os.environ if environ is None else environ
    known = {str(field.validation_alias) for field in Table.model_fields.values()}
    notes = []
    for name in sorted(environ):
        if name in _GONE:
            notes.append(f"{name} has no meaning here: {_GONE[name]}")
        elif name not in known and name not in RENAMED and name not in _INTERNAL:
            near = difflib.get_close_matches(name, known, 1, _NEAR) if "_" in name else []
            if near or name.startswith(_OURS):
                notes.append(f"{name} is not known" + (f"; do you mean {near[0]}?" if near else ""))
    return notes
