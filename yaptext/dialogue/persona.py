"""Personas: the character that speaks, as text for the model."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from msgspec import UnsetType

from yaptext.errors import BadMessage, SettingsError, UnknownPersona
from yaptext.files import read_file
from yaptext.wire.frames import Gender, Identity, PersonaFields

_T = TypeVar("_T")
_GENDERS: dict[str, Gender] = {
    "woman": "woman", "man": "man", "female": "woman", "male": "man", "f": "woman", "m": "man",
}  # fmt: skip
"""What `assistant_gender` may be, trimmed and in any case, and the one spelling that the service uses."""
_IDENTITIES: dict[str, Identity] = {name: name for name in get_args(Identity)}


def gender(value: str) -> Gender:
    """Raises `BadMessage`."""
    return _one_of(_GENDERS, value, "assistant_gender")


def _one_of(known: Mapping[str, _T], value: str, field: str) -> _T:
    found = known.get(value.strip().lower())
    if found is None:
        raise BadMessage(f"Invalid value; allowed are {', '.join(known)} - at $.{field}")
    return found


@dataclass(frozen=True, slots=True)
class Style:
    """One file of `personas/`: `text` speaks to the model in the second person."""

    name: str
    title: str
    text: str


@cache
def _built_in() -> dict[str, Style]:
    return _of_folder(resources.files("yaptext.dialogue") / "personas")


_MOST_BYTES = 1_000_000
_own: dict[str, Style] = {}
"""The operator's, by `use_folder`."""


def styles() -> dict[str, Style]:
    """Every style by its name: the operator's laid over the built-in ones."""
    return dict(sorted((_built_in() | _own).items()))


def use_folder(folder: Path | None) -> None:
    """Takes the styles of `PERSONAS_DIR`: `NAME.toml` with `title` and `text`. Raises `SettingsError`, and then those
    that were there stay."""
    found = {} if folder is None else _of_folder(folder)
    _own.clear()
    _own.update(found)


def _of_folder(folder: Any) -> dict[str, Style]:
    found = {}
    try:
        files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    except OSError as error:
        raise SettingsError(f"PERSONAS_DIR={str(folder)!r} cannot be read: {error}") from None
    for file in files:
        name = file.name.removesuffix(".toml").strip().lower()
        try:
            data = tomllib.loads(read_file(file, _MOST_BYTES).decode())
            found[name] = Style(name, str(data["title"]), " ".join(str(data["text"]).split()))
        except KeyError as error:
            raise SettingsError(f"PERSONAS_DIR: {file} has no {error.args[0]}") from None
        except (OSError, ValueError) as error:
            raise SettingsError(f"PERSONAS_DIR: {file} is no persona: {error}") from None
    return found


def style(name: str) -> Style:
    """By its name, trimmed and in any case. Raises `UnknownPersona` with the list of known styles."""
    known = styles()
    found = known.get(name.strip().lower())
    if found is None:
        raise UnknownPersona(f"Unknown persona_style; known are {', '.join(known)} - at $.persona_style")
    return found


def check_style(name: str) -> None:
    """Raises `SettingsError` where the default style does not exist."""
    try:
        style(name)
    except UnknownPersona:
        raise SettingsError(f"DEFAULT_PERSONA_STYLE={name!r} is not allowed: known are {', '.join(styles())}") from None


@dataclass(frozen=True, slots=True)
class Persona:
    """Who speaks to whom in one session. `text` (the client's own) wins over `style`."""

    style: str | None = None
    gender: Gender | None = None
    identity: Identity | None = None
    text: str | None = None

    def merge(self, fields: PersonaFields) -> Persona:
        """This persona with the client's fields laid over: absent keeps, null clears. Raises `BadMessage`,
        `UnknownPersona`."""
        changes: dict[str, str | None] = {}
        if not isinstance(fields.persona_style, UnsetType):
            changes["style"] = None if fields.persona_style is None else style(fields.persona_style).name
        if not isinstance(fields.assistant_gender, UnsetType):
            changes["gender"] = None if fields.assistant_gender is None else gender(fields.assistant_gender)
        if not isinstance(fields.user_identity, UnsetType):
            changes["identity"] = (
                None if fields.user_identity is None else _one_of(_IDENTITIES, fields.user_identity, "user_identity")
            )
        if not isinstance(fields.persona_text, UnsetType):
            changes["text"] = fields.persona_text
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

    def compose(self, default_style: str) -> str:
        """The text of the persona segment. It holds nothing that changes from turn to turn."""
        if self.text is not None:
            return self.text
        known = styles()
        # One may have gone from the operator's folder meanwhile.
        chosen = known.get(self.style or "") or known.get(default_style) or known["wholesome"]
        who = f"You are Yap, a {self.gender}" if self.gender else "You are Yap, a companion"
        whom = {
            None: "the user",
            "woman": "the user, who is a woman",
            "man": "the user, who is a man",
            "non-binary": "the user, who is non-binary",
        }[self.identity]
        return (
            f"{who} talking with {whom} on a voice call. {chosen.text} Answer every question directly and correctly, "
            "in one to three short spoken sentences. No lists, no emoji, no stage directions."
        )
