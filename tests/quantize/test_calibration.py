"""calibration.py: which texts are read, how they are laid out, and what is too little."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from quantize.tiny import tiny_tokenizer
from transformers import ByT5Tokenizer

from yaptext.dialogue.chat_prompt import ChatPrompts, Limits
from yaptext.dialogue.persona import Persona, styles
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import Message
from yaptext.engine.base import Role
from yaptext.engine.codec import HubCodec
from yaptext.errors import QuantizeDelayed, QuantizeRefused, SettingsError, StartError
from yaptext.quantize import calibration
from yaptext.quantize.calibration import HELD_OUT_BLOCKS, Samples, fingerprint, label, read, samples
from yaptext.settings import Settings

CODEC = HubCodec(tiny_tokenizer(), max_model_len=2**31, block_size=1)
TOOLS = ToolSet.from_file(None)
PROSE = "The tide came in over the flats, slow and then all at once, and the birds went up.\n\n"


def wanted(text: object = "builtin", **variables: Any) -> Settings:
    return Settings.load(YAP_TEXT_DEVICE="cpu", AWQ_CALIBRATION=str(text), **variables)


def laid_out(settings: Settings, roles: Sequence[Role] = ("chat", "tool")) -> Samples:
    return asyncio.run(samples(settings, CODEC, read(settings), roles, TOOLS))


def text_of(blocks: Sequence[Sequence[int]]) -> str:
    return str(tiny_tokenizer().decode([token for block in blocks for token in block]))


# Reading


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "large"])
def test_what_is_no_file_of_text_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A FIFO would never open, a device would never end."""
    path = tmp_path / "text.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            monkeypatch.chdir(tmp_path)
            bound.bind("text.txt")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(calibration.MAX_FILE_BYTES + 1)
    with pytest.raises(SettingsError) as caught:
        read(wanted(path))
    line = str(caught.value)
    assert line.startswith(f"AWQ_CALIBRATION={path} ") and "\n" not in line
    assert ("over" if kind == "large" else "no regular file") in line


def test_every_form_of_line_is_taken(tmp_path: Path) -> None:
    """Text, both ways to write messages, decisions; blank lines are none. System messages are the service's own."""
    rows = [
        {"text": "plain"},
        {"messages": [{"user": "hi"}, {"assistant": "hello"}]},
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]},
        {"utterance": "play jazz", "calls": [{"name": "play_music", "arguments": {"query": "jazz"}}]},
        {"utterance": "thanks", "history": [{"user": "hi"}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    corpus = read(wanted(tmp_path / "a.jsonl"))
    assert corpus.texts == ["plain"]
    assert [[m.speaker for m in c["messages"]] for c in corpus.conversations] == [["user", "assistant"], ["user"]]
    assert [len(decision["calls"]) for decision in corpus.decisions] == [1, 0]


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    """A line separator of Unicode may stand in a string; a mark at the start and returns before the line ends are
    Windows' own, and no text."""
    rows = [{"text": "one\u2028two\x85three\x0cfour"}, {"text": "five"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read(wanted(tmp_path / "a.jsonl")).texts == ["one\u2028two\x85three\x0cfour", "five"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + PROSE.replace("\n", "\r\n").encode() * 200)
    texts = read(wanted(tmp_path / "b.txt")).texts
    assert len(texts) > 5 and texts[0].startswith("The tide") and "\r" not in "".join(texts)


def test_a_conversation_tells_whose_it_is(tmp_path: Path) -> None:
    """Style, gender and identity as a client names them, or a persona of its own."""
    talk = [{"user": "hi"}, {"assistant": "hello"}]
    named = {"style": "chill", "gender": "female", "identity": "non-binary", "messages": talk}
    (tmp_path / "a.jsonl").write_text(
        "\n".join(map(json.dumps, [named, {"persona_text": "A pirate.", "messages": talk}]))
    )
    first, second = (row["persona"] for row in read(wanted(tmp_path / "a.jsonl")).conversations)
    assert first == Persona("chill", "woman", "non-binary") and second == Persona(text="A pirate.")


def test_a_folder_is_all_its_texts(tmp_path: Path) -> None:
    """At any depth, in the order of their names; other files are passed over."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "deep" / "a.txt").write_text("ant")
    (tmp_path / "c.jsonl").write_text('{"text": "cat"}')
    (tmp_path / "d.pdf").write_bytes(b"\xff")
    assert sorted(read(wanted(tmp_path)).texts) == ["ant", "bee", "cat"]


def test_a_long_text_is_cut_at_its_paragraphs(tmp_path: Path) -> None:
    """Into documents of which some can be set aside; nothing is lost."""
    (tmp_path / "a.txt").write_text(PROSE * 200)
    texts = read(wanted(tmp_path / "a.txt")).texts
    assert len(texts) > 5
    assert sum(text.count("The tide") for text in texts) == 200


@pytest.mark.parametrize("between", [" ", "\n", ""], ids=["words", "lines", "letters"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_text_without_paragraphs_is_cut_all_the_same(tmp_path: Path, between: str, suffix: str) -> None:
    """At its words where it has some: one line is not one document, of which nothing could be set aside."""
    text = between.join(str(number) for number in range(20_000))
    (tmp_path / f"a.{suffix}").write_text(json.dumps({"text": text}) if suffix == "jsonl" else text)
    texts = read(wanted(tmp_path / f"a.{suffix}")).texts
    assert 40 < len(texts) < 80 and between.join(texts).split() == text.split()
    assert len(laid_out(wanted(tmp_path / f"a.{suffix}"), ("chat",)).held_out) == HELD_OUT_BLOCKS


@pytest.mark.parametrize(
    "line", ["5", "[]", "{}", '{"text": 5}', '{"messages": [{"robot": "hi"}]}', '{"messages": [5]}',
             '{"messages": [{"user": 5}]}', '{"utterance": "x", "calls": [{"name": 5}]}',
             '{"messages": [], "style": 5}', '{"messages": [], "identity": "x"}', '{"messages": [], "gender": ["man"]}']
)  # fmt: skip
def test_a_line_of_another_form_is_named(tmp_path: Path, line: str) -> None:
    """File and line, and what would have been right."""
    (tmp_path / "mine.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(QuantizeRefused, match=r'^line 2 of mine.jsonl is none of \{"text"'):
        read(wanted(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize("line", [b"{", b'{"text": "\xff"}', b"# a comment"])
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: bytes) -> None:
    """With its file, below the folder that was given, and the reason."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line)
    with pytest.raises(QuantizeRefused, match=r"^line 3 of deep/mine.jsonl is no JSON: "):
        read(wanted(tmp_path))


def test_a_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    """Rather than read as something else."""
    (tmp_path / "mine.txt").write_bytes("Füße".encode("latin-1"))
    with pytest.raises(QuantizeRefused, match=r"^calibration file mine.txt cannot be read: .*utf-8"):
        read(wanted(tmp_path / "mine.txt"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"style": "gloomy"}, "Unknown persona_style; known are chill,"),
        ({"persona_text": "x" * 3000}, "persona_text is 3"),
    ],
)
def test_a_persona_that_the_service_would_refuse_is_named(tmp_path: Path, fields: dict[str, str], reason: str) -> None:
    """By its line: it is found when the samples are laid out."""
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + json.dumps({"messages": [{"user": "hi"}], **fields}))
    with pytest.raises(QuantizeRefused, match=rf"^line 2 of a.jsonl: {reason}"):
        laid_out(wanted(tmp_path / "a.jsonl"), ("chat",))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    """No file, and a folder without texts."""
    with pytest.raises(SettingsError, match=r"is neither a file, a folder, `builtin` nor `hub:NAME`"):
        read(wanted(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"holds no .txt or .jsonl file"):
        read(wanted(tmp_path))


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """One line, whatever the file system says; a folder that is called like a text is none."""
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.txt" / "b.txt").write_text("bee")
    assert read(wanted(tmp_path)).texts == ["bee"]
    with pytest.raises(SettingsError, match=r"^AWQ_CALIBRATION=x+ cannot be read: .*too long"):
        read(wanted("x" * 5000))


def test_a_data_set_is_read_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name from the hub, here from a folder that stands for one; what cannot be read is one line."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for constants in (datasets.config, huggingface_hub.constants):  # both have read their variables by now
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read(wanted(f"hub:{tmp_path}/set")).texts == ["one", "two"]
    with pytest.raises(QuantizeDelayed, match=r"^cannot read the data set no/such-set: "):
        read(wanted("hub:no/such-set", HF_TOKEN=" hf_one\n"))


def test_a_token_of_two_lines_is_not_quoted() -> None:
    """The client would do so: it cannot be sent."""
    with pytest.raises(SettingsError, match=r"^HF_TOKEN=\(hidden\) is not allowed"):
        read(wanted("hub:no/such-set", HF_TOKEN="hf_one\nhf_two"))


def test_the_fingerprint_tells_texts_apart(tmp_path: Path) -> None:
    """By what they say, not by where they lie or when they were written."""
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text)
    a, b, c = (fingerprint(wanted(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert fingerprint(wanted("hub:some/set")) == "hub:some/set"


def test_the_name_of_the_text_tells_nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in what may be pushed: a path is the user's own, also one that looks like something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin-notes").mkdir()
    named = {"builtin": "builtin", "hub:some/set": "hub:some/set", "builtin-notes": "own", f"hub:{tmp_path}": "own"}
    assert {text: label(wanted(text)) for text in named} == named
    assert str(tmp_path) not in fingerprint(wanted(f"hub:{tmp_path}"))


# The built-in set


def test_the_built_in_set_is_what_the_service_sees() -> None:
    """Every style speaks, every tool is called, and every call fits its schema; half of the decisions are no."""
    corpus = read(wanted())
    assert (len(corpus.conversations), len(corpus.decisions), corpus.texts) == (72, 160, [])
    assert {conversation["persona"].style for conversation in corpus.conversations} == set(styles())
    validator = jsonschema.Draft202012Validator(json.loads(TOOLS.schema))
    decided = [[{"name": c.name, "arguments": c.arguments} for c in row["calls"]] for row in corpus.decisions]
    assert all(validator.is_valid(calls) for calls in decided)
    assert {call["name"] for calls in decided for call in calls} == set(TOOLS.names)
    assert 60 <= sum(not calls for calls in decided) <= 100


# Laying it out


async def test_chat_samples_are_the_services_own_prompts(tmp_path: Path) -> None:
    """Token for token what a turn of that session would ask, then the reply."""
    talk = [{"user": "hi"}, {"assistant": "hello"}, {"user": "who are you"}, {"assistant": "REPLY" * 200}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"style": "chill", "messages": talk}) for _ in range(6)))
    settings = wanted(tmp_path / "a.jsonl", AWQ_CALIBRATION_TOKENS=256, AWQ_CALIBRATION_SAMPLES=99)
    found = (await samples(settings, CODEC, read(settings), ("chat",), TOOLS)).calibration
    prompts = await ChatPrompts.open(CODEC, settings.chat_prompt_format, Limits.of(settings))
    persona = Persona("chill").compose(settings.default_persona_style)
    expected = []
    for number, day in enumerate(("Monday", "Wednesday", "Friday", "Sunday", "Monday", "Wednesday")):
        messages = [Message("user", "hi"), Message("assistant", "hello")]
        prompt = await prompts.turn(persona, messages, "who are you", f"{day}, {number:02}:{7 * number:02}")
        expected.append(prompt + await CODEC.encode("REPLY" * 200))
    ids = [token for block in found for token in block]
    assert any(ids[: len(document)] == document for document in expected)


def with_template(template: str | None) -> HubCodec:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return HubCodec(tokenizer, max_model_len=2**31, block_size=1)


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + str(
    tiny_tokenizer().chat_template
)


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (NO_SYSTEM, "<|im_start|>user\n<|persona|>\nYou are Yap"),
        (None, "<|persona|>\nYou are Yap"),
        ("{{ no such thing", "<|persona|>\nYou are Yap"),
    ],
    ids=["no system", "none", "broken"],
)
def test_a_template_is_no_condition(template: str | None, opening: str) -> None:
    """One that refuses system messages has the persona in the user's; without one the prompt is bare. As serving."""
    settings = wanted()
    laid = asyncio.run(samples(settings, with_template(template), read(settings), ("chat", "tool"), TOOLS))
    text = text_of(laid.calibration)
    assert opening in text and set(laid.made_of) == {"conversation", "decision"}
    assert ("<|im_start|>" in text) == (template == NO_SYSTEM)


def test_a_tokenizer_without_its_fast_form_is_named() -> None:
    """Neither serving nor calibration does without."""
    with pytest.raises(StartError, match=r"^ByT5Tokenizer is no fast tokenizer: the model needs a tokenizer.json"):
        HubCodec(ByT5Tokenizer(), max_model_len=2**31, block_size=1)


def test_roles_share_the_samples() -> None:
    """A model that serves both sees talk and decisions in turns; one that serves one sees nothing of the other."""
    both, chat, tool = (laid_out(wanted(), roles) for roles in (("chat", "tool"), ("chat",), ("tool",)))
    assert (set(both.made_of), set(chat.made_of), set(tool.made_of)) == (
        {"conversation", "decision"}, {"conversation"}, {"decision"},
    )  # fmt: skip
    assert "<|persona|>" in text_of(chat.calibration) and "<|persona|>" not in text_of(tool.calibration)
    assert '"name":' in text_of(tool.calibration)
    assert "<|persona|>" in text_of(both.calibration) and '"name":' in text_of(both.calibration)


def test_a_tool_model_sees_decisions_whatever_text_is_given(tmp_path: Path) -> None:
    """Where the user's own holds none, the built-in ones."""
    (tmp_path / "a.txt").write_text(PROSE * 300)
    assert set(laid_out(wanted(tmp_path / "a.txt"), ("tool",)).made_of) == {"text", "decision"}


@pytest.mark.parametrize(("count", "size"), [(4, 128), (8, 512), (64, 256)])
def test_blocks_have_one_length_and_their_number(count: int, size: int) -> None:
    """As asked for; what is measured on is set aside from what is calibrated with, and all is the same every time."""
    settings = wanted(AWQ_CALIBRATION_SAMPLES=count, AWQ_CALIBRATION_TOKENS=size)
    found = laid_out(settings)
    assert (len(found.calibration), len(found.held_out)) == (count, HELD_OUT_BLOCKS)
    assert {len(block) for block in found.calibration + found.held_out} == {size}
    assert found == laid_out(settings)


def test_long_samples_do_not_make_the_measurement_long(tmp_path: Path) -> None:
    """It keeps a number a token and vocabulary entry: gigabytes a thousand tokens."""
    (tmp_path / "a.txt").write_text(PROSE * 3000)
    found = laid_out(wanted(tmp_path / "a.txt", AWQ_CALIBRATION_TOKENS=8192, AWQ_CALIBRATION_SAMPLES=5), ("chat",))
    assert [len(block) for block in found.calibration] == [8192] * 5
    assert [len(block) for block in found.held_out] == [1024] * HELD_OUT_BLOCKS


def test_nothing_is_measured_on_that_was_calibrated_with(tmp_path: Path) -> None:
    """No document is on both sides."""
    texts = [f"<{number}>" + f"{number} " * 300 for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = laid_out(wanted(tmp_path / "a.jsonl", AWQ_CALIBRATION_SAMPLES=999), ("chat",))
    kept, aside = text_of(found.calibration), text_of(found.held_out)
    shared = [number for number in range(50) if f" {number} {number} " in kept and f" {number} {number} " in aside]
    assert shared == []


@pytest.mark.parametrize("roles", [("chat",), ("chat", "tool")])
def test_too_little_text_is_told_before_any_model_loads(tmp_path: Path, roles: tuple[Role, ...]) -> None:
    """With how much there is and how much is needed."""
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"utterance": "x"}')
    settings = wanted(tmp_path / "a.jsonl", AWQ_CALIBRATION_TOKENS=4096)
    line = r"^the calibration text is \d+ tokens in \d documents; about 29\d+ in several are needed"
    with pytest.raises(QuantizeRefused, match=line):
        laid_out(settings, roles)


def test_one_long_conversation_is_too_few_documents(tmp_path: Path) -> None:
    """There may be tokens enough, and yet nothing to set aside: the line does not say that they are too few."""
    talk = [{"user": "hi"}, {"assistant": "word " * 4000}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    with pytest.raises(QuantizeRefused, match=r"tokens in 1 documents; about 37\d+ in several are needed"):
        laid_out(wanted(tmp_path / "a.jsonl"), ("chat",))
