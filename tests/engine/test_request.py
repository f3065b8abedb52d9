"""A request as vLLM takes it: what is not done anew, and that nothing else changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from vllm.sampling_params import SamplingParams

from yaptext.engine import demo
from yaptext.engine.base import Sampling
from yaptext.engine.vllm import request

_SCHEMA = '{"type":"integer"}'


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The schemas that vLLM was asked to check; it refuses the one that says so."""
    asked: list[str] = []

    def check(self: Any, *_: Any) -> None:
        asked.append(self.structured_outputs.json)
        if self.structured_outputs.json == "refused":
            raise ValueError("no grammar")

    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", check)
    monkeypatch.setattr(request, "valid_schemas", OrderedDict())
    return asked


def check(schema: str) -> Any:
    params: Any = request.params_of(Sampling(max_tokens=1, json_schema=schema))
    params._validate_structured_outputs(None, SimpleNamespace(backend="xgrammar"), None)
    return params


def test_a_schema_is_checked_once(checked: list[str]) -> None:
    """The second request has the backend that the first was given for it."""
    check(_SCHEMA)
    assert check(_SCHEMA).structured_outputs._backend == "xgrammar"
    assert checked == [_SCHEMA]


def test_a_schema_that_was_refused_is_refused_again(checked: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="no grammar"):
            check("refused")
    assert checked == ["refused"] * 2


def test_schemas_are_kept_as_long_as_they_are_used(checked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A service for many clients' tools does not grow with them."""
    monkeypatch.setattr(request, "KEPT_SCHEMAS", 2)
    for schema in ("a", "b", "a", "c", "a", "b"):
        check(schema)
    assert checked == ["a", "b", "c", "b"]


def test_only_a_schema_that_is_new_goes_to_a_thread(checked: list[str]) -> None:
    """vLLM looks at a raw prompt there, and at the schema with it."""
    plain, constrained = Sampling(max_tokens=1), Sampling(max_tokens=1, json_schema=_SCHEMA, cache_salt="s")
    assert request.prompt_of([1], plain)["type"] == "token"
    assert "type" not in request.prompt_of([1], constrained)
    check(_SCHEMA)
    prompt = request.prompt_of([1], constrained)
    assert (prompt["type"], prompt["prompt_token_ids"], prompt["cache_salt"]) == ("token", [1], "s")


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(request, "decoders", [])
    whole = tokenizers.decoders.DecodeStream
    tokenizers.decoders.DecodeStream = request.WHOLE
    yield
    tokenizers.decoders.DecodeStream = whole


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("end", ["a word", "a word ", "\n", "assistant\n", "\U0001f9ff"])
@pytest.mark.parametrize("reply", ["and", " and more", "\n\n", "\U0001f9ff\U0001f9ff", "\u4f60\u597d\uff0c"])
def test_a_reply_reads_as_it_does_after_the_whole_prompt(state_folder: Path, end: str, reply: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(demo.folder(state_folder) / "tokenizer.json"))
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("word " * 300 + end, reply))

    def told() -> list[str | None]:
        stream = tokenizers.decoders.DecodeStream(ids=prompt, skip_special_tokens=True)
        return [stream.step(tokenizer, token) for token in answer]

    after_the_whole = told()
    request.decode_from_the_end(SimpleNamespace(backend_tokenizer=tokenizer))
    assert tokenizers.decoders.DecodeStream is request.primed_with_the_end
    assert told() == after_the_whole
    assert "".join(filter(None, after_the_whole)) == reply


@pytest.mark.usefixtures("restored")
def test_a_tokenizer_that_reads_runs_of_bytes_as_one_gets_the_whole_prompt() -> None:
    """As Llama 2's: the end of such a run is none. That holds for all engines, whichever is opened last."""
    texts = ["[INST]", "h", "i", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.models.BPE(
        vocab={text: number for number, text in enumerate(texts)}, merges=[], byte_fallback=True
    )
    tokenizer, other = tokenizers.Tokenizer(model), tokenizers.Tokenizer(model)
    steps = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    tokenizer.decoder = tokenizers.decoders.Sequence(steps)
    tokenizer.add_special_tokens(["[INST]"])
    prompt = [*tokenizer.encode("\U0001f9ff" * 4).ids, 0]
    for engine in (other, tokenizer, other):
        request.decode_from_the_end(SimpleNamespace(backend_tokenizer=engine))
    stream = tokenizers.decoders.DecodeStream(ids=prompt, skip_special_tokens=True)
    assert [stream.step(tokenizer, token) for token in (1, 2)] == ["h", "i"]
