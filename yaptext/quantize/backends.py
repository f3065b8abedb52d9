"""Chooses the library that quantizes a model: autoawq if it is right for it, else llm-compressor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from yaptext.errors import QuantizeRefused
from yaptext.quantize import compressor, mapping
from yaptext.quantize.recipes import RECIPES
from yaptext.settings import Settings


@dataclass(frozen=True, slots=True)
class Backend:
    """`quantize` is called as awq.quantize. `kept` is a pattern for the linear layers that it leaves as they are."""

    name: str
    quantize: Callable[..., Any]
    kept: str = ""


def choose(settings: Settings, config: dict[str, Any]) -> Backend:
    """The backend for a model with this config.json. Raises `QuantizeRefused` if there is none, `SettingsError` if it
    is not installed."""
    wanted, model_type = settings.quantizer, config.get("model_type")
    refusal = mapping.refusal(config)
    if wanted != "llmcompressor" and refusal is None:
        from yaptext.quantize import awq

        return Backend("autoawq", awq.quantize)
    if wanted != "autoawq" and model_type in RECIPES:
        found = partial(compressor.quantize, wheels=compressor.wheels(settings.llmcompressor))
        return Backend("llmcompressor", found, RECIPES[model_type].kept_pattern)
    reasons = []
    if wanted != "llmcompressor" and refusal is not None:
        reasons.append(f"autoawq {refusal}")
    if wanted != "autoawq":
        reasons.append(f"llm-compressor can do {', '.join(sorted(RECIPES))}")
    unknown = f"cannot quantize the architecture {model_type!r}"
    if wanted == "autoawq" and model_type in RECIPES:
        unknown += " with QUANTIZER=autoawq"
    raise QuantizeRefused(f"{unknown}: {'; '.join(reasons)}")
