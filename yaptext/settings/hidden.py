"""Paths that the units do not see: a setting that names one fails there alone."""

from __future__ import annotations

import os
from pathlib import Path

from yaptext.settings.old_names import moved_names
from yaptext.settings.table import Table

HIDDEN = ("/home", "/root", "/run/user")
"""What `ProtectHome=yes` takes from a unit."""


def hidden_paths(told: str) -> list[str]:
    """One note for each variable whose path the error `told` is about, if systemd runs this process and its units do
    not see that path: there it looks like one that is missing or closed."""
    if not os.environ.get("INVOCATION_ID"):
        return []
    values = {**os.environ, **moved_names().values}
    notes = []
    for field in Table.model_fields.values():
        name = str(field.validation_alias)
        path = values.get(name, "").removeprefix("sqlite:")
        folder = next((folder for folder in HIDDEN if Path(path).is_relative_to(folder)), None)
        if folder and path in told:
            notes.append(f"{name}: the unit does not see {folder} (ProtectHome=yes): move it, for example to /srv")
    return notes
