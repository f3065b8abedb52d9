"""Which settings differ from their defaults, as a log may show them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pydantic import SecretStr

from yaptext import secrets
from yaptext.settings.table import Table

_MOST_SHOWN = 500
"""Characters of a value in the log: journald splits lines over 48 KiB."""


class Changes(NamedTuple):
    """`settings` that differ from the defaults, by variable, and their `sources`: `environment` or `credential`."""

    settings: dict[str, str | float]
    sources: dict[str, str]


def changes(settings: Table) -> Changes:
    """For a log: a secret is shown as "set", and so is a URL, which may contain one. Leaves out what systemd sets.
    `settings` are those of `Settings.load()`. Raises `SettingsError` if a credential cannot be read."""
    credentials = secrets.credentials()
    changed = Changes({}, {})
    for field_name, field in Table.model_fields.items():
        name, value = str(field.validation_alias), getattr(settings, field_name)
        if value != field.default and not (field.description or "").startswith("Set by systemd"):
            changed.settings[name] = _shown(value)
            changed.sources[name] = "credential" if name in credentials else "environment"
    return changed


def _shown(value: Any) -> str | float:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (int, float)):
        return value
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    if isinstance(value, SecretStr) or "://" in text:
        return "set"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
