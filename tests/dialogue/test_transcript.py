"""dialogue/transcript.py: reading written transcripts, where a long one is cut, and what was heard of a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from yaptext.dialogue.heard import heard_part
from yaptext.dialogue.talk import Line
from yaptext.dialogue.transcript import Message, Transcript, keep_recent, of_items, parse, recent
from yaptext.wire.frames import HistoryItem

often = settings(max_examples=200, deadline=None)

LABELS = {
    "User": "user",
    "user": "user",
    "HUMAN": "user",
    "Assistant": "assistant",
    "AI": "assistant",
    "bot": "assistant",
}
words = st.text(st.characters(exclude_categories=["Cs", "Zs", "Zl", "Zp", "Cc"], exclude_characters=":"), min_size=1)
sentences = st.lists(words, min_size=1, max_size=4).map(" ".join)
breaks = st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \n\t"])
sizes = st.lists(st.integers(1, 40), max_size=40)


def told(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.speaker, message.text) for message in messages]


def transcript(text: str) -> Transcript:
    found = Transcript()
    found.replace(parse(text))
    return found


def of_one_form(rest: st.SearchStrategy[Any], *, unlabelled: bool = False) -> st.SearchStrategy[list[tuple[Any, Any]]]:
    """Labelled lines of one transcript: all its labels are capitalized, or none is."""

    def lines(lower: bool) -> st.SearchStrategy[list[tuple[Any, Any]]]:
        labels = st.sampled_from([label for label in sorted(LABELS) if label.islower() == lower])
        return st.lists(st.tuples(st.none() | labels if unlabelled else labels, rest), max_size=8)

    return st.booleans().flatmap(lines)


# parse


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", []),
        (" \n\t\r\n ", []),
        ("User: hi", [("user", "hi")]),
        ("User: hi\nAssistant: hello", [("user", "hi"), ("assistant", "hello")]),
        ("User: hi\r\nAssistant: hello\r\n", [("user", "hi"), ("assistant", "hello")]),
        ("User: a\nb\n\nc\nAI: d", [("user", "a\nb\n\nc"), ("assistant", "d")]),
        ("User:\nhi", [("user", "hi")]),
        ("User:hi", [("user", "hi")]),
        ("  User :   hi  ", [("user", "hi")]),
        ("User: User: hi", [("user", "User: hi")]),
        ("User: so I said: hi", [("user", "so I said: hi")]),
        ("User: hi\nUser: again", [("user", "hi"), ("user", "again")]),
        ("User:\nAssistant: hello\nUser:   ", [("assistant", "hello")]),
        ("just text", [("note", "just text")]),
        ("just text\nof two lines\nUser: hi", [("note", "just text"), ("note", "of two lines"), ("user", "hi")]),
        ("\ufeffUser: hi", [("user", "hi")]),
        ("**User:** hi\n**Assistant:** yes", [("user", "hi"), ("assistant", "yes")]),
        ("**User**: hi\n__AI__: yes", [("user", "hi"), ("assistant", "yes")]),
        ("[12:01] User: hi\n[12:02] AI: yes", [("user", "hi"), ("assistant", "yes")]),
        ("12:01 User: hi\n12:02:30 Bot: yes", [("user", "hi"), ("assistant", "yes")]),
        ("You: hi\nAI: yes", [("user", "hi"), ("assistant", "yes")]),
        ("User\uff1a\u4f60\u597d\nAssistant\uff1a\u662f", [("user", "\u4f60\u597d"), ("assistant", "\u662f")]),
        ("User: def f(\nuser: str,\n)\nAI: ok", [("user", "def f(\nuser: str,\n)"), ("assistant", "ok")]),
        ("user: hi\nassistant: yes", [("user", "hi"), ("assistant", "yes")]),
        ("Superuser: hi", [("note", "Superuser: hi")]),
        ("Note: hi\nUser: x\nSystem: y", [("note", "Note: hi"), ("user", "x\nSystem: y")]),
        ("User: naïve 🫠 漢字", [("user", "naïve 🫠 漢字")]),
    ],
)
def test_transcripts_are_read_line_by_line(text: str, messages: list[tuple[str, str]]) -> None:
    """A labelled line begins a message, other lines continue it, and empty messages are dropped."""
    assert told(parse(text)) == messages


@pytest.mark.parametrize(("label", "speaker"), LABELS.items())
def test_labels(label: str, speaker: str) -> None:
    """User and human, assistant, AI and bot, however they are capitalized."""
    assert told(parse(f"{label}: hi")) == [(speaker, "hi")]


@pytest.mark.parametrize("label", ["u\u017fer", "a\u017f\u017fi\u017ftant", "a\u0131", "A\u0130"])
def test_letters_that_only_fold_to_a_label_are_read(label: str) -> None:
    """A dotless i or a long s is equal to i or s where case is ignored; such a line is text like any other."""
    assert "merhaba" in parse(f"{label}: merhaba")[0].text


@given(of_one_form(sentences), breaks)
@often
def test_a_written_transcript_reads_as_what_was_said(said: list[tuple[str, str]], line_break: str) -> None:
    """What one side writes, with whatever line breaks, the other reads."""
    text = line_break.join(f"{label}: {sentence}" for label, sentence in said)
    assert told(parse(text)) == [(LABELS[label], sentence) for label, sentence in said]


@given(of_one_form(st.lists(words, max_size=4), unlabelled=True), breaks)
@often
def test_no_word_is_lost_or_moved(lines: list[tuple[str | None, list[str]]], line_break: str) -> None:
    """All words but the labels stand in the messages, in the order of the text."""
    text = line_break.join(" ".join([f"{label}:" if label else "", *line]) for label, line in lines)
    read = [word for message in parse(text) for word in message.text.split()]
    assert read == [word for _, line in lines for word in line]


@given(st.text())
@often
def test_any_text_is_a_transcript(text: str) -> None:
    """Nothing that a client sends as history fails; what has no speaker stands before all that has one."""
    messages = parse(text)
    assert all(message.text == message.text.strip() != "" for message in messages)
    speakers = [message.speaker for message in messages]
    assert "note" not in speakers[speakers.count("note") :]
    if ":" not in text and "\uff1a" not in text:
        assert [word for message in messages for word in message.text.split()] == text.split()


# keep_recent


@pytest.mark.parametrize(
    ("sizes", "limit", "first"),
    [
        ([], 0, 0),
        ([], 100, 0),
        ([50, 50], 100, 0),
        ([50, 50, 1], 100, 1),
        ([10, 10, 10, 10, 61], 100, 3),
        ([101], 100, 1),
        ([1, 1, 1], 0, 3),
    ],
)
def test_the_oldest_messages_go_first(sizes: list[int], limit: int, first: int) -> None:
    """What fits stays; else a quarter of the limit's worth goes at once."""
    assert keep_recent(sizes, limit) == first


@given(sizes, st.integers(0, 120))
@often
def test_what_is_kept_fits(sizes: list[int], limit: int) -> None:
    """The kept messages are a suffix within the limit, and nothing is dropped that need not be by the rounding."""
    first = keep_recent(sizes, limit)
    assert 0 <= first <= len(sizes)
    assert sum(sizes[first:]) <= limit
    excess = sum(sizes) - limit
    if excess <= 0:
        assert first == 0
    else:
        assert sum(sizes[: first - 1]) < excess + max(1, limit // 4)


@given(sizes, st.integers(1, 120))
@often
def test_a_growing_transcript_moves_its_cut_once_a_quarter(sizes: list[int], limit: int) -> None:
    """While less than a quarter of the limit is added, the cut, and with it the cached prefix, stays."""
    quarter = max(1, limit // 4)
    cuts = [keep_recent(sizes[:end], limit) for end in range(len(sizes) + 1)]
    assert cuts == sorted(cuts), "nothing that was dropped comes back"
    excess = max(0, sum(sizes) - limit)
    assert len(set(cuts)) - 1 <= -(-excess // quarter)


@given(sizes, st.integers(1, 120))
@often
def test_a_kept_transcript_moves_its_cut_once_a_quarter(sizes: list[int], limit: int) -> None:
    """Where dropped messages are gone for good, a cut makes room for a quarter of the limit, less one message."""
    kept: list[int] = []
    added = 0
    for size in sizes:
        kept.append(size)
        added += size
        first = keep_recent(kept, limit)
        if first:
            assert added + max(sizes) >= limit // 4, "two cuts with less than a quarter between them"
            added = 0
        del kept[:first]


# Transcript


def test_what_stays_the_same_keeps_its_messages() -> None:
    """A client that sends its whole transcript each turn has only what is new read anew."""
    talk = transcript("User: a\nAssistant: b")
    before = list(talk.messages)
    talk.replace(parse("User: a\nAssistant: b\nUser: c"))
    assert talk.messages[:2] == before
    assert told(talk.messages) == [("user", "a"), ("assistant", "b"), ("user", "c")]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("User: a\nAssistant: b\nUser: c", 3),
        ("User: a\nAssistant: b", 2),
        ("User: a\nAssistant: B\nUser: c", 1),
        ("User: a\nUser: b\nUser: c", 1),
        ("Assistant: a\nAssistant: b\nUser: c", 0),
        ("User: b", 0),
        ("", 0),
    ],
)
def test_messages_stay_up_to_the_first_difference(text: str, same: int) -> None:
    """Speaker and text both count; what follows a difference is new."""
    talk = transcript("User: a\nAssistant: b\nUser: c")
    before = list(talk.messages)
    talk.replace(parse(text))
    assert told(talk.messages) == told(parse(text))
    assert [new is old for new, old in zip(talk.messages, before, strict=False)] == [
        index < same for index in range(min(len(talk.messages), 3))
    ]


def test_a_turn_adds_what_was_said_and_sent() -> None:
    """The reply is kept as it was sent, since heard_chars counts in it."""
    talk = Transcript()
    talk.add_turn("hi", " Hello.\n")
    assert told(talk.messages) == [("user", "hi"), ("assistant", " Hello.\n")]


@pytest.mark.parametrize("reply", ["", " \n"])
def test_a_turn_without_a_reply_adds_the_utterance(reply: str) -> None:
    """What the user said is remembered even where nothing was answered."""
    talk = Transcript()
    talk.add_turn("hi", reply)
    assert told(talk.messages) == [("user", "hi")]


@pytest.mark.parametrize(
    ("heard", "left"),
    [
        (0, None),
        (1, None),
        (3, " He"),
        (5, " Hell"),
        (7, " Hello"),
        (8, " Hello f"),
        (14, " Hello friend."),
        (99, " Hello friend."),
    ],
)
def test_a_reply_is_cut_to_what_was_heard(heard: int, left: str | None) -> None:
    """Characters count from the first that was sent; a reply of which nothing was heard goes."""
    talk = Transcript()
    talk.add_turn("hi", " Hello friend.")
    talk.cut_reply(heard, None)
    assert told(talk.messages) == [("user", "hi")] + ([("assistant", left)] if left else [])


def test_a_cut_reply_is_a_new_message() -> None:
    """Token ids of the longer text are not taken for those of the shorter."""
    talk = Transcript()
    talk.add_turn("hi", "Hello friend.")
    talk.messages[-1].lines.turns = Line("Hello friend.")
    talk.cut_reply(5, None)
    assert talk.messages[-1].lines.turns is None


@pytest.mark.parametrize("heard", [14, 15, 1000])
def test_a_reply_that_was_heard_whole_stays_as_it_is(heard: int) -> None:
    """It keeps its last white space, and its token ids."""
    talk = Transcript()
    talk.add_turn("hi", "Hello friend.\n")
    before = talk.messages[-1]
    talk.cut_reply(heard, None)
    assert talk.messages[-1] is before


@pytest.mark.parametrize("text", ["", "User: hi", "just a note"])
def test_only_a_reply_is_cut(text: str) -> None:
    """Where the last word is not the assistant's, there is nothing to cut."""
    talk = transcript(text)
    before = list(talk.messages)
    talk.cut_reply(1, None)
    assert talk.messages == before


@given(sentences, st.integers(0, 200))
@often
def test_what_was_heard_is_a_beginning_of_what_was_sent(reply: str, heard: int) -> None:
    """Cutting never adds, and cutting again at the same place changes nothing."""
    talk = Transcript()
    talk.add_turn("hi", reply)
    talk.cut_reply(heard, None)
    once = told(talk.messages)
    talk.cut_reply(heard, None)
    assert told(talk.messages) == once
    for _, text in once[1:]:
        assert reply[:heard].startswith(text)


# What was heard


@pytest.mark.parametrize(
    ("reply", "text", "left"),
    [
        ("Hello there. How are you?", "Hello there.", "Hello there."),
        ("Hello there. How are you?", "hello  THERE", "Hello there"),
        ("Hello *there*! How \U0001f642 are you?", "Hello there! How are", "Hello *there*! How \U0001f642 are"),
        ("Hello there.", "Hello there.", "Hello there."),
        ("Hello there.", "Good bye", None),
        ("Hello there.", "", None),
        ("It is 42 degrees.", "It is forty-two degrees.", "It is"),
        ("Stra\u00dfe und Haus", "STRASSE und", "Stra\u00dfe und"),
    ],
)
def test_what_a_voice_spoke_is_found_in_the_reply(reply: str, text: str, left: str | None) -> None:
    """Whatever its case and spaces, and without what no voice says; from the first word that differs on nothing was."""
    talk = Transcript()
    talk.add_turn("hi", reply)
    talk.cut_reply(None, text)
    assert told(talk.messages) == [("user", "hi")] + ([("assistant", left)] if left else [])


@given(
    st.text(st.sampled_from("ab \u0301\U0001f468\u200d\U0001f469\U0001f1eb\U0001f1f7\U0001f44d\U0001f3fd")),
    st.integers(0, 40),
)
@often
def test_a_cut_is_never_inside_a_grapheme(reply: str, heard: int) -> None:
    """An accent stays with its letter, a family stays one picture."""
    graphemes = regex.findall(r"\X", reply)
    part = heard_part(reply, heard, None)
    assert any(part == "".join(graphemes[:count]) for count in range(len(graphemes) + 1))
    assert len(part) <= heard


@given(sentences, st.integers(0, 200), st.randoms())
@often
def test_heard_text_is_heard_chars(reply: str, heard: int, random: Any) -> None:
    """The words of a beginning, spoken in another case and with other spaces, cut where their characters do."""
    part = heard_part(reply, heard, None)
    spoken = "".join(
        random.choice([char, char.upper() if char.upper().casefold() == char.casefold() else char]) for char in part
    )
    found = heard_part(reply, None, spoken.replace(" ", "  "))
    assert found.split() == part.split() or not any(char.isalnum() for char in part)


def test_a_cut_reply_can_say_so() -> None:
    """INTERRUPTED_MARK stands behind what was heard; a reply that was heard whole has none."""
    talk = Transcript()
    talk.add_turn("hi", "Hello friend.")
    talk.cut_reply(99, None, "[interrupted]")
    assert told(talk.messages)[-1] == ("assistant", "Hello friend.")
    talk.cut_reply(5, None, "[interrupted]")
    assert told(talk.messages)[-1] == ("assistant", "Hello [interrupted]")


def test_a_history_comes_as_a_list() -> None:
    """Of roles and contents; names are told, empty messages go."""
    items = [
        HistoryItem("system", "Earlier on."),
        HistoryItem("user", "hi", "Bob"),
        HistoryItem("assistant", "  "),
        HistoryItem("assistant", "hello"),
    ]
    assert told(of_items(items)) == [("note", "Earlier on."), ("user", "Bob: hi"), ("assistant", "hello")]


def test_a_long_last_line_with_a_newline_leaves_something() -> None:
    """After the cut there was nothing but the end of that line."""
    assert recent("User: " + "x" * 5000 + "\n", 1000).strip("x\n") == "" != recent("User: " + "x" * 5000 + "\n", 1000)


def test_a_transcript_is_cut_by_its_bytes() -> None:
    """A rare character may be as many tokens as it has bytes."""
    assert len(recent("\U00012345" * 5000, 4000).encode()) <= 4000
