"""dialogue/persona.py: the styles, what a client's fields change, and what a persona says to the model."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from msgspec import UNSET

from yaptext.dialogue.persona import Persona, style, styles, use_folder
from yaptext.errors import BadMessage, SettingsError, UnknownPersona
from yaptext.settings import Settings
from yaptext.wire.frames import Gender, Identity, PersonaFields

FULL = Persona(style="savage", gender="woman", identity="man", text="own words")
GENDERS: list[Any] = [None, *get_args(Gender)]
IDENTITIES: list[Any] = [None, *get_args(Identity)]


def test_there_are_eight_styles_and_more() -> None:
    """savage, flirty, wholesome and five of our own, at least; the default is one of them."""
    assert len(styles()) >= 8
    assert {"savage", "flirty", "wholesome", Settings.load().default_persona_style} <= set(styles())


@pytest.mark.parametrize("name", styles())
def test_every_style_is_named_after_its_file_and_speaks_to_the_model(name: str) -> None:
    """A style has a title and one line of text in the second person."""
    found = style(name)
    assert found.name == name
    assert found.title
    assert "\n" not in found.text
    assert "you" in found.text.lower().split()


@pytest.mark.parametrize("name", ["", "unheard-of", "../savage", "x" * 10_000])
def test_an_unknown_style_is_told_the_known_ones(name: str) -> None:
    """The message lists every style, names the field, and quotes no more of the value than a name's length."""
    with pytest.raises(UnknownPersona) as caught:
        style(name)
    assert all(known in caught.value.message for known in styles())
    assert caught.value.message.endswith("at $.persona_style")
    assert len(caught.value.message) < 400


def test_absent_fields_keep() -> None:
    """A client that says nothing of the persona changes nothing."""
    assert FULL.merge(PersonaFields()) == FULL


def test_null_clears() -> None:
    """Each field can be cleared by itself, and all together leave a persona that was never changed."""
    nothing = PersonaFields(persona_text=None, persona_style=None, assistant_gender=None, user_identity=None)
    assert FULL.merge(nothing) == Persona()
    assert FULL.merge(PersonaFields(persona_text=None)) == Persona("savage", "woman", "man", None)


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"persona_style": "flirty"}, "style", "flirty"),
        ({"persona_text": "other words"}, "text", "other words"),
        ({"persona_text": ""}, "text", ""),
        ({"assistant_gender": "man"}, "gender", "man"),
        ({"assistant_gender": "male"}, "gender", "man"),
        ({"assistant_gender": "female"}, "gender", "woman"),
        ({"user_identity": "non-binary"}, "identity", "non-binary"),
    ],
)
def test_a_given_field_changes_itself_alone(fields: dict[str, Any], attribute: str, value: str) -> None:
    """The aliases of a gender become its one spelling; "" is a value, not an absence."""
    merged = FULL.merge(PersonaFields(**fields))
    assert getattr(merged, attribute) == value
    others = [name for name in ("style", "gender", "identity", "text") if name != attribute]
    assert all(getattr(merged, name) == getattr(FULL, name) for name in others)


def test_an_unknown_style_changes_nothing() -> None:
    """The merge fails as a whole."""
    with pytest.raises(UnknownPersona):
        FULL.merge(PersonaFields(persona_style="unheard-of", persona_text=None))


@pytest.mark.parametrize("text", ["own words", ""])
def test_a_text_of_ones_own_is_taken_as_it_is(text: str) -> None:
    """persona_text wins over style, gender and identity, also where it says nothing."""
    assert Persona("savage", "woman", "man", text).compose("wholesome") == text


def test_a_persona_without_a_style_takes_the_default() -> None:
    """A session that names no style speaks as DEFAULT_PERSONA_STYLE says."""
    assert Persona().compose("coach") == Persona(style="coach").compose("wholesome")


@pytest.mark.parametrize("name", styles())
def test_gender_identity_and_style_are_all_heard(name: str) -> None:
    """Every combination gives the model another text, and each holds the style's own."""
    texts = {Persona(name, gender, identity).compose("x") for gender, identity in product(GENDERS, IDENTITIES)}
    assert len(texts) == len(GENDERS) * len(IDENTITIES)
    assert all(style(name).text in text for text in texts)


@pytest.mark.parametrize("gender", GENDERS[1:])
@pytest.mark.parametrize("identity", IDENTITIES[1:])
def test_who_speaks_to_whom_is_said(gender: Any, identity: Any) -> None:
    """The assistant's gender comes before the user's identity."""
    text = Persona("coach", gender, identity).compose("x")
    assert text.index(f"a {gender}") < text.index(f"who is {'' if identity == 'non-binary' else 'a '}{identity}")


def test_the_text_is_the_same_every_turn() -> None:
    """Nothing in it changes by itself: it can stand in a cached prefix."""
    assert FULL.merge(PersonaFields(persona_text=None)).compose("x") == Persona("savage", "woman", "man").compose("x")


def test_fields_are_absent_unless_given() -> None:
    """The empty PersonaFields says nothing about anything."""
    assert all(getattr(PersonaFields(), name) is UNSET for name in PersonaFields.__struct_fields__)


@pytest.mark.parametrize("name", ["Savage", " savage ", "SAVAGE"])
def test_a_style_is_found_in_any_case(name: str) -> None:
    """And with white space around it."""
    assert style(name).name == "savage"


@pytest.mark.parametrize("name", ["religious", "delulu", "spiritual"])
def test_the_styles_of_the_guides_time_are_there(name: str) -> None:
    """Clients that name them keep working."""
    assert name in styles()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"assistant_gender": " F "}, ("woman", None)),
        ({"assistant_gender": "Male"}, ("man", None)),
        ({"assistant_gender": "m", "user_identity": "Non-Binary "}, ("man", "non-binary")),
    ],
)
def test_who_speaks_to_whom_is_read_in_any_case(fields: dict[str, str], expected: tuple[Any, Any]) -> None:
    """Trimmed, and with one letter."""
    found = Persona().merge(PersonaFields(**fields))
    assert (found.gender, found.identity) == expected


@pytest.mark.parametrize(
    ("field", "allowed"),
    [("assistant_gender", "woman, man, female, male, f, m"), ("user_identity", "woman, man, non-binary")],
)
def test_what_is_none_of_them_is_told_what_is_allowed(field: str, allowed: str) -> None:
    """In the message, with the field."""
    with pytest.raises(BadMessage, match=rf"allowed are {allowed} - at \$\.{field}"):
        Persona().merge(PersonaFields(**{field: "robot"}))


def test_styles_of_the_operator_are_laid_over_ours(tmp_path: Path) -> None:
    """A file of the same form is a style by its name; a wrong one leaves those that were there."""
    (tmp_path / "pirate.toml").write_text('title = "Pirate"\ntext = "You are a pirate."')
    (tmp_path / "savage.toml").write_text('title = "Mild"\ntext = "You are mild."')
    try:
        use_folder(tmp_path)
        assert (style("Pirate").text, style("savage").title) == ("You are a pirate.", "Mild")
        (tmp_path / "broken.toml").write_text('title = "No text"')
        with pytest.raises(SettingsError, match=r"PERSONAS_DIR: .*broken.toml has no text"):
            use_folder(tmp_path)
        assert style("pirate").title == "Pirate"
    finally:
        use_folder(None)
    assert "pirate" not in styles() and style("savage").title == "Savage"
    with pytest.raises(SettingsError, match=r"PERSONAS_DIR=.* cannot be read"):
        use_folder(tmp_path / "nowhere")


def test_a_persona_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO would never open."""
    os.mkfifo(tmp_path / "own.toml")
    with pytest.raises(SettingsError, match=r"own\.toml is no persona: .*no regular file"):
        use_folder(tmp_path)
