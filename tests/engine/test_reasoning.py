"""engine/vllm/reasoning.py: vLLM's parsers over the tokens of a reply."""

from __future__ import annotations

import pytest
from made import with_template

from yaptext.engine.base import Reasoning
from yaptext.errors import StartError

TOKENIZER = with_template("gpt2", None)
MARKS = {"start": "<think>", "end": "</think>"}


def said(text: str, reasoning: Reasoning, step: int = 1) -> tuple[str, int, int]:
    """What is spoken of a reply that comes in so many tokens at once, the tokens that are thinking, and all of them."""
    from yaptext.engine.vllm.reasoning import Thoughts

    thoughts = Thoughts(reasoning, TOKENIZER)
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    spoken, thought = "", 0
    for place in range(0, len(ids), step):
        some = ids[place : place + step]
        text, count = thoughts.take(TOKENIZER.decode(some, skip_special_tokens=False), some)
        spoken, thought = spoken + text, thought + count
    return spoken + thoughts.rest(), thought, len(ids)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_thinking_that_the_prompt_opened_ends_at_its_mark(step: int) -> None:
    """All before it is silent, and what is spoken begins without the empty lines after it."""
    spoken, thought, tokens = said("Well, let me see.\n</think>\n\nHello there.", Reasoning(opened=True, **MARKS), step)
    assert spoken == "Hello there."
    assert 0 < thought < tokens


def test_half_a_character_of_the_speech_is_no_thinking() -> None:
    """Its first token gives no text yet."""
    from yaptext.engine.vllm.reasoning import Thoughts

    thoughts = Thoughts(Reasoning(opened=True, **MARKS), TOKENIZER)
    end, word, *emoji = (TOKENIZER.encode(text, add_special_tokens=False) for text in ("</think>", "Hi", "\U0001f600"))
    counts = [thoughts.take(text, ids)[1] for text, ids in (("Hm.</think>", end), ("Hi", word), ("", emoji[0][:1]))]
    assert counts == [len(end), 0, 0]


def test_thinking_that_never_ends_is_never_spoken() -> None:
    """A reply that ran out of tokens while it thought."""
    spoken, thought, tokens = said("Well, let me see. And then", Reasoning(opened=True, **MARKS))
    assert (spoken, thought) == ("", tokens)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<think>Hm.</think>Hello.", "Hello."), ("Hello.", "Hello."), ("<think>Hm", "")],
)
def test_thinking_that_the_model_opens(text: str, expected: str) -> None:
    """Without its first mark nothing is thinking."""
    assert said(text, Reasoning(**MARKS))[0] == expected


def test_a_parser_by_its_name() -> None:
    """As vLLM knows it."""
    assert said("Hm.</think>Hello.", Reasoning("deepseek_r1"))[0] == "Hello."


@pytest.mark.parametrize(
    ("reasoning", "message"),
    [
        (Reasoning("no_such"), "no_such"),
        (Reasoning(start="[THINK]", end="[/THINK]", opened=True), "start/end tokens"),
        (Reasoning("openai_gptoss"), "another kind of server"),
    ],
)
def test_what_cannot_be_parsed_is_found_at_the_start(reasoning: Reasoning, message: str) -> None:
    """Not at the first reply."""
    from yaptext.engine.vllm.reasoning import check

    with pytest.raises(StartError, match=message):
        check(reasoning, TOKENIZER)
