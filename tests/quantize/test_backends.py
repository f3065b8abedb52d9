"""backends.py: which library quantizes what, and what to say if none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from yaptext.errors import QuantizeRefused, SettingsError
from yaptext.quantize import backends, compressor, mapping, recipes
from yaptext.settings import Settings


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that looks like llm-compressor's: nothing is run here."""
    (tmp_path / "wheels" / f"llmcompressor-{compressor.VERSION}.dist-info").mkdir(parents=True)
    monkeypatch.setenv("LLMCOMPRESSOR", str(tmp_path / "wheels"))


def chosen(quantizer: str = "auto", **config: Any) -> str:
    return backends.choose(Settings.load(QUANTIZER=quantizer), config).name


def test_autoawq_does_what_it_does_right() -> None:
    """The rest is llm-compressor's, and so is what the user gives it."""
    assert {chosen(model_type=name) for name in mapping.MAPPINGS} == {"autoawq"}
    others = set(recipes.RECIPES) - set(mapping.MAPPINGS)
    assert len(others) > 20 and {chosen(model_type=name) for name in others} == {"llmcompressor"}
    assert chosen("llmcompressor", model_type="llama") == "llmcompressor"
    assert chosen("autoawq", model_type="llama") == "autoawq"


@pytest.mark.parametrize("name", ["gpt2", "opt", "starcoder2", "Yi", "a-new-one", None])
def test_an_architecture_that_nobody_can_do_is_refused_by_name(name: str | None) -> None:
    """The line has what can be done."""
    with pytest.raises(QuantizeRefused, match=rf"^cannot quantize the architecture {name!r}: .*llama.*qwen3_moe"):
        chosen(model_type=name)


@pytest.mark.parametrize(
    ("quantizer", "config", "line"),
    [
        ("autoawq", {"model_type": "mixtral"}, "'mixtral' with QUANTIZER=autoawq: autoawq can do .*llama"),
        ("llmcompressor", {"model_type": "helium"}, "'helium': llm-compressor can do .*llama"),
        (
            "auto",
            {"model_type": "stablelm", "use_parallel_residual": True},
            "'stablelm': autoawq cannot do stablelm with use_parallel_residual; llm-compressor can do ",
        ),
    ],
)
def test_the_line_says_which_backend_refuses(quantizer: str, config: dict[str, Any], line: str) -> None:
    """And with which setting."""
    with pytest.raises(QuantizeRefused, match=line):
        chosen(quantizer, **config)


def test_a_missing_llm_compressor_is_told_with_the_remedy(tmp_path: Path) -> None:
    """Before a model is downloaded. Another version counts as none: its internals are used."""
    (tmp_path / "llmcompressor-0.1.dist-info").mkdir()
    with pytest.raises(
        SettingsError, match=rf"llm-compressor {compressor.VERSION} does not lie in {tmp_path}: `make q"
    ):
        backends.choose(Settings(llmcompressor=tmp_path), {"model_type": "mixtral"})
