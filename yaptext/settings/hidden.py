"""Paths that the units do not see: a setting that names one fails only in a unit."""

from __future__ import annotations

import os
from pathlib import Path

from yaptext.settings.old_names import moved_names
from yaptext.settings.table import Table

HIDDEN = ("/home", "/root", "/run/user")
"""What `ProtectHome=yes` hides from a unit."""


def hidden_paths(message: str) -> list[str]:
    """One note for each variable whose path the error `message` names, if systemd runs this process and its units do
    not see that path: it then looks missing or unreadable."""
    if not os.environ.get("INVOCATION_ID"):
        return []
    values = {**os.environ, **moved_names().values}
    notes = []
    for field in Table.model_fields.values():
        name = str(field.validation_alias)
        path = values.get(name, "").removeprefix("sqlite:")
        folder = next((folder for folder in HIDDEN if Path(path).is_relative_to(folder)), None)
        if folder and path in message:
            notes.append(f"{name}: the unit does not see {folder} (ProtectHome=yes): move it, for example to /srv")
    return notes
