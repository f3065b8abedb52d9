"""dialogue/persona.py: the styles, what a client's fields change, and what a persona says to the model."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
from msgspec import UNSET

from yaptext.dialogue.persona import Persona, style, styles
from yaptext.errors import BadMessage
from yaptext.settings import Settings
from yaptext.wire.messages import Gender, Identity, PersonaFields

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


@pytest.mark.parametrize("name", ["", "Savage", "unheard-of", "../savage", "x" * 10_000])
def test_an_unknown_style_is_told_the_known_ones(name: str) -> None:
    """The message lists every style, names the field, and quotes no more of the value than a name's length."""
    with pytest.raises(BadMessage) as caught:
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
    with pytest.raises(BadMessage):
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
