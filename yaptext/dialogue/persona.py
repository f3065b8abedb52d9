"""Personas: which character speaks, and the text that tells the model so."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from msgspec import UNSET, UnsetType

from yaptext.errors import BadMessage, SettingsError
from yaptext.wire.messages import Gender, Identity, PersonaFields, gender


@dataclass(frozen=True, slots=True)
class Style:
    """One file of `personas/`: `text` speaks to the model in the second person."""

    name: str
    title: str
    text: str


@cache
def styles() -> dict[str, Style]:
    folder = resources.files("yaptext.dialogue") / "personas"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            data = tomllib.loads(file.read_text(encoding="utf-8"))
            name = file.name.removesuffix(".toml")
            found[name] = Style(name, data["title"], " ".join(data["text"].split()))
    return found


def style(name: str) -> Style:
    """Raises `BadMessage` with the list of known styles."""
    known = styles()
    if name not in known:
        raise BadMessage(f"Unknown persona_style; known are {', '.join(known)} - at $.persona_style")
    return known[name]


def check_style(name: str) -> None:
    """Raises `SettingsError` where the default style does not exist."""
    try:
        style(name)
    except BadMessage:
        raise SettingsError(f"DEFAULT_PERSONA_STYLE={name!r} is not allowed: known are {', '.join(styles())}") from None


@dataclass(frozen=True, slots=True)
class Persona:
    """Who speaks to whom in one session. `text` (the client's own) wins over `style`."""

    style: str | None = None
    gender: Gender | None = None
    identity: Identity | None = None
    text: str | None = None

    def merge(self, fields: PersonaFields) -> Persona:
        """This persona with the client's fields laid over: absent keeps, null clears. Raises `BadMessage`."""
        changes: dict[str, str | None] = {}
        if not isinstance(fields.persona_style, UnsetType):
            changes["style"] = None if fields.persona_style is None else style(fields.persona_style).name
        if not isinstance(fields.assistant_gender, UnsetType):
            changes["gender"] = None if fields.assistant_gender is None else gender(fields.assistant_gender)
        if fields.user_identity is not UNSET:
            changes["identity"] = fields.user_identity
        if not isinstance(fields.persona_text, UnsetType):
            changes["text"] = fields.persona_text
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

    def compose(self, default_style: str) -> str:
        """The text of the persona segment. It holds nothing that changes from turn to turn."""
        if self.text is not None:
            return self.text
        chosen = style(self.style or default_style)
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
