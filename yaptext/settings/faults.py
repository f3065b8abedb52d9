"""The faults of the settings, one line each."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from yaptext import secrets
from yaptext.settings.old_names import moved_names
from yaptext.settings.table import Table


def lines(error: ValidationError) -> list[str]:
    """One line for each fault, without its value if that is a secret."""
    found = []
    for fault in error.errors():
        said = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:  # rules over several variables have their own text
            found += said.splitlines()
            continue
        name = str(fault["loc"][0])
        field = next(f for f in Table.model_fields.values() if f.validation_alias == name)
        if name in secrets.credentials():
            shown = secrets.credential(name)
        else:
            shown = f"{name}={'(hidden)' if 'SecretStr' in str(field.annotation) else repr(fault['input'])}"
        found.append(f"{shown} is not allowed: {said[0].lower()}{said[1:]}. {field.description}")
    return found


def of_state_folder(given: Mapping[str, Any]) -> list[str]:
    """One line if the named state folder can never be written to. A full or read-only disk may pass."""
    named = {**os.environ, **moved_names().values, **given}
    name = next((name for name in ("YAP_TEXT_STATE_DIR", "STATE_DIRECTORY") if named.get(name)), None)
    if name is None:
        return []
    place = Path(named[name])
    try:
        while not place.exists():  # it will be created
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return []
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            return []
        return [f"{name}={str(named[name])!r} is not allowed: it cannot be written to: {error.strerror}"]
