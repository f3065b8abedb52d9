"""dialogue/speakable.py: what can be read aloud of what a model writes, whatever the pieces are in which it comes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yaptext.dialogue.speakable import Speakable

TEXTS = {
    "Hello **world**! \U0001f600 How are *you*?": "Hello world! How are you?",
    "*laughs* Sure. *winks* ok": "Sure. ok",
    "I am *very* happy *smiles broadly*.": "I am very happy smiles broadly.",
    "# Title\n- one\n- two\n\nSee [docs](http://x.y/z) or https://a.b/c now.": "Title\none\ntwo\nSee docs or now.",
    "```python\nprint(1)\n```\nDone.": "print(1)\nDone.",
    "a < b and 3 * 4 * 5 = 60": "a < b and 3 * 4 * 5 = 60",
    "<b>bold</b> Dr. Smith, 3.14 & 50%, e.g. U.S.A.!": "bold Dr. Smith, 3.14 & 50%, e.g. U.S.A.!",
    "I like it \U0001f44d\U0001f3fd.": "I like it.",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f1eb\U0001f1f7": "family",
    "one_two __three__ ~~gone~~ `x`": "one_two three gone x",
    "![a cat](cat.png) and (a) [b]": "a cat and (a) [b]",
    "1. first\n2. second": "1. first\n2. second",
    "\u00a9 2024 \u2122 5\u20ac": "\u00a9 2024 \u2122 5\u20ac",
    "Wait... what?! No \u2013 yes.": "Wait... what?! No \u2013 yes.",
    "*unclosed thing\nnext": "*unclosed thing\nnext",
    "what www.example.com/x?y=1 was": "what was",
    "": "",
}
_pieces = st.lists(
    st.sampled_from(
        [
            *("*", "**", "`", "```", "\n", " ", "word", "Hi.", "\U0001f642", "\u200d", "\U0001f3fd", "<b>", "<", ">"),
            "[a](b)",
            *("[", "](", ")", "!", "http", "://x", "www.", "# ", "- ", "1", "_", "__", "~~", "---", "|"),
            *("\u00e9", "h", "w", "'"),
        ]
    ),
    max_size=14,
)  # fmt: skip


def spoken(*pieces: str) -> str:
    text = Speakable()
    return "".join(map(text.take, pieces)) + text.rest()


@pytest.mark.parametrize(("text", "expected"), TEXTS.items())
def test_what_is_spoken(text: str, expected: str) -> None:
    """Numbers, abbreviations and marks stay; markdown, emoji, stage directions, tags, fences and links go."""
    assert spoken(text) == expected
    assert spoken(*text) == expected


@given(pieces=_pieces, cuts=st.lists(st.integers(0, 60), max_size=8))
@settings(max_examples=800, deadline=None)
def test_how_a_stream_is_split_changes_nothing(pieces: list[str], cuts: list[int]) -> None:
    """Any split of the stream gives the same text."""
    text = "".join(pieces)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    assert spoken(*(text[begin:end] for begin, end in pairwise(places))) == spoken(text)


@given(text=st.text(st.sampled_from("abc DE.,!? \n'0123\u4f60"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_plain_words_stay_as_they_are(text: str) -> None:
    """But for white space, of which one is enough."""
    assert spoken(text).split() == text.split()


@given(text=st.text(st.sampled_from("abc de.,!\n"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_plain_words_are_not_held_back(text: str) -> None:
    """Of prose at most the white space and two characters wait."""
    told = Speakable()
    given_so_far = ""
    said = ""
    for char in text:
        given_so_far += char
        said += told.take(char)
        assert len("".join(given_so_far.split())) - len("".join(said.split())) <= 2
