"""calibration.py: which texts are read, how they are laid out, and what is too little."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from quantize.tiny import tiny_tokenizer

from yaptext.dialogue.persona import styles
from yaptext.dialogue.prompt import ChatPrompts, Limits
from yaptext.dialogue.toolset import ToolSet
from yaptext.engine.base import Role
from yaptext.engine.codec import HubCodec
from yaptext.errors import QuantizeError
from yaptext.quantize.calibration import HELD_OUT_BLOCKS, Samples, fingerprint, read, samples
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


@pytest.mark.parametrize(
    "line", ["5", "[]", "{}", '{"text": 5}', '{"messages": [{"robot": "hi"}]}', '{"messages": [5]}',
             '{"messages": [{"user": 5}]}', '{"utterance": "x", "calls": [{"name": 5}]}']
)  # fmt: skip
def test_a_line_of_another_form_is_named(tmp_path: Path, line: str) -> None:
    """File and line, and what would have been right."""
    (tmp_path / "mine.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(QuantizeError, match=r'^line 2 of mine.jsonl is none of \{"text"'):
        read(wanted(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{"])
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    """The line tells the file and the reason."""
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(QuantizeError, match=r"^calibration file mine.jsonl cannot be read: "):
        read(wanted(tmp_path / "mine.jsonl"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    """No file, and a folder without texts."""
    with pytest.raises(QuantizeError, match=r"is no file or folder, nor `builtin` or `hub:NAME`"):
        read(wanted(tmp_path / "none"))
    with pytest.raises(QuantizeError, match=r"holds no .txt or .jsonl file"):
        read(wanted(tmp_path))


def test_a_data_set_is_read_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name from the hub, here from a folder that stands for one; what cannot be read is one line."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read(wanted(f"hub:{tmp_path}/set")).texts == ["one", "two"]
    with pytest.raises(QuantizeError, match=r"^cannot read the data set no/such-set: "):
        read(wanted("hub:no/such-set"))


def test_the_fingerprint_tells_texts_apart(tmp_path: Path) -> None:
    """By what they say, not by where they lie or when they were written."""
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text)
    a, b, c = (fingerprint(wanted(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert fingerprint(wanted("hub:some/set")) == "hub:some/set"


# The built-in set


def test_the_built_in_set_is_what_the_service_sees() -> None:
    """Every style speaks, every tool is called, and every call fits its schema; half of the decisions are no."""
    corpus = read(wanted())
    assert (len(corpus.conversations), len(corpus.decisions), corpus.texts) == (72, 160, [])
    assert {conversation["style"] for conversation in corpus.conversations} == set(styles())
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
    found = text_of((await samples(settings, CODEC, read(settings), ("chat",), TOOLS)).calibration)
    prompts = await ChatPrompts.open(CODEC, settings.chat_prompt_format, Limits.of(settings))
    corpus = read(settings)
    from yaptext.dialogue.persona import Persona

    persona = Persona("chill").compose(settings.default_persona_style)
    messages = corpus.conversations[0]["messages"]
    prompt = text_of([await prompts.turn(persona, messages[:2], "who are you", "Monday, 00:00")])
    opening = prompt[: prompt.index("Now: ")]
    assert opening in found and "<|persona|>\nYou are Yap" in opening and "Assistant: hello" in opening
    assert found.count("REPLYREPLY") > 0


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
    with pytest.raises(QuantizeError, match=r"^the calibration text is \d+ tokens; at least about \d+ are needed"):
        laid_out(settings, roles)
