"""commands/prompt.py: what a model is sent, for people and for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made import TEMPLATES, with_template

from yaptext.commands import main


def model(folder: Path, template: str | None, name: str = "model") -> str:
    """A folder with a tokenizer and a template, as far as a hub model has one."""
    path = folder / name
    with_template("gpt2", TEMPLATES[template] if template else None).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"n_positions": 8192, "eos_token_id": [1]}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    return str(path)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> list[dict[str, Any]]:
    assert main.run(["prompt", *arguments, "--json"]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_chat_prompt_with_all_that_it_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is what the template renders, the ids are the tokenizer's, the ends come from everywhere."""
    folder = model(tmp_path, "chatml")
    talk = tmp_path / "talk.txt"
    talk.write_text("User: Hi!\nAssistant: Hello.\n")
    (found,) = shown(capsys, folder, "--persona-style", "savage", "--history", str(talk), "--utterance", "Who?")
    assert list(found)[:10] == [
        "model", "role", "format", "exact", "prefix_stable", "text", "ids", "prefix_tokens", "stop_ids", "stop",
    ]  # fmt: skip
    assert (found["model"], found["role"], found["format"]) == (folder, "chat", "segments")
    assert (found["exact"], found["prefix_stable"], found["thinking"], found["tools_told"]) == (
        True,
        True,
        "none",
        None,
    )
    tokenizer = with_template("gpt2", TEMPLATES["chatml"])
    assert found["ids"] == tokenizer.encode(found["text"], add_special_tokens=False)
    assert found["text"].startswith("<|im_start|>system\n<|persona|>\nYou are Yap")
    assert "<|history|>\nUser: Hi!\nAssistant: Hello.\nNow: " in found["text"]
    assert found["text"].endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert 0 < found["prefix_tokens"] < len(found["ids"])
    ends = {1, 5, 6, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert found["stop_ids"] == sorted(ends)


@pytest.mark.parametrize("format", ["segments", "turns", "bare"])
def test_the_format_is_that_of_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    """Over that of the setting."""
    (found,) = shown(capsys, model(tmp_path, "chatml"), "--format", format)
    assert (found["format"], found["exact"], found["fallback"]) == (format, True, None)


def test_a_tool_prompt_describes_its_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the option, where the template puts them: here before the last message of the user."""
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "light", "description": "Switches a light."}]')
    (found,) = shown(capsys, model(tmp_path, "brackets with tools"), "--role", "tool", "--tools", str(tools))
    assert (found["format"], found["exact"], found["tools_told"]) == ("template", True, True)
    assert "[TOOLS][{" in found["text"] and found["text"].endswith("[/TOOLS][INST]Hello![/INST]")


def test_several_models_and_one_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has its line, in order; the status says that one is missing."""
    good, bare = model(tmp_path, "marks"), model(tmp_path, None, "bare")
    empty = tmp_path / "empty"
    empty.mkdir()
    found = shown(capsys, good, str(empty), "/no/such", bare, status=1)
    assert [each["model"] for each in found] == [good, str(empty), "/no/such", bare]
    assert "cannot read the tokenizer" in found[1]["error"] and "is not a folder" in found[2]["error"]
    assert "error" not in found[0]
    assert (found[3]["format"], found[3]["fallback"]) == ("bare", "the model has no chat template")


def test_for_people_it_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of facts, and the prompt as it is."""
    assert main.run(["prompt", model(tmp_path, "chatml")]) == 0
    head, *text = capsys.readouterr().out.splitlines()
    assert head.startswith("== ") and "format segments, exact True, prefix_stable True" in head
    assert text[0] == "<|im_start|>system"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--persona-style", "nobody"], "known are"),
        (["--history", "/no/such"], "--history /no/such cannot be read"),
        (["--tools", "/no/such"], "is not a list of tools"),
    ],
)
def test_a_wrong_option_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Before any model is read."""
    assert main.run(["prompt", "/no/such", *arguments]) != 0
    assert message in capsys.readouterr().err


def test_a_template_in_a_file_of_its_own_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`chat_template.json`, as models have it that also see."""
    folder = Path(model(tmp_path, None))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES["marks"]}))
    (found,) = shown(capsys, str(folder))
    assert (found["format"], found["exact"]) == ("segments", True)
    assert found["text"].startswith("<|sys|>")
