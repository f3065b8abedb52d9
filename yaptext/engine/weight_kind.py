"""What kind of weights a checkpoint holds: float, or quantized in which way."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from yaptext.engine import awq_results, header, hub_client
from yaptext.engine.model_config import read_json
from yaptext.settings import Settings

Kind = Literal["float", "fp8", "awq", "gptq", "other"]


def kind_of(source: str, config: dict[str, Any], cache: Path | None = None) -> Kind:
    """What kind of weights a checkpoint holds: its config decides; if that says nothing, its tensors do, and if none
    are on this disk, whole words of its name. `cache` is the hub client's. Raises nothing: whatever is broken is
    found by what reads it."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        quantization = {}
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(quantization)
    for kind in ("awq", "gptq", "fp8"):
        if kind in str(method):
            return kind
    if method or quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "other"  # quantized in a way of its own: the engine reads the config, too
    words = re.split(r"[^a-z0-9]+", Path(source).name.lower())
    by_name: Kind = "gptq" if "gptq" in words else "awq" if "awq" in words else "float"
    return _kind_of_tensors(_on_disk(source, cache), by_name)


def kind_at_hub(settings: Settings, source: str, config: dict[str, Any]) -> Kind:
    """The same for a model that may not be on this disk yet. If its name alone says that it is quantized, the index of
    its weights is fetched, if it has one."""
    cache = hub_client.cache(settings)
    kind = kind_of(source, config, cache)
    if kind == "float" or config.get("quantization_config") or _on_disk(source, cache) is not None:
        return kind
    with suppress(Exception):  # the hub client raises dozens of types; most models of one file have no index
        read_json(settings, source, header.INDEX)
    return kind_of(source, config, cache)


def _on_disk(source: str, cache: Path | None) -> Path | None:
    """Where the files of a model lie. Nothing is fetched."""
    if awq_results.is_folder(source):
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    for name in (header.INDEX, header.WHOLE):
        try:
            found = try_to_load_from_cache(source, name, cache_dir=cache)
        except (OSError, ValueError):  # no name that a hub could know
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _kind_of_tensors(folder: Path | None, by_name: Kind) -> Kind:
    """By the tensors of an index or of one file. AWQ and GPTQ both have `qweight`, packed along the outputs or along
    the inputs: only its file shows the difference, and without it the name."""
    try:
        places = header.places(folder) if folder is not None else {}
        packed = next((name for name in places if name.endswith(".qweight")), None)
        if any(name.endswith(".g_idx") for name in places):
            return "gptq"
    except (OSError, ValueError):
        return by_name
    if not places:
        return by_name
    try:
        if packed is not None:
            scales = packed.removesuffix("qweight") + "scales"
            outputs = header.tensors(places[scales])[scales].shape[-1]
            return "gptq" if header.tensors(places[packed])[packed].shape[-1] == outputs else "awq"
        first = header.tensors(next(iter(places.values())))
        return "fp8" if any(tensor.dtype.startswith("F8_") for tensor in first.values()) else "float"
    except (OSError, ValueError, LookupError):
        return "float" if packed is None else "gptq" if by_name == "gptq" else "awq"


def _compressed(quantization: dict[str, Any]) -> Kind:
    """What llm-compressor made: 4-bit whole numbers are its AWQ (and GPTQ, which is served alike)."""
    groups = quantization.get("config_groups")
    schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    if schemes and all((scheme.get("num_bits"), scheme.get("type")) == (4, "int") for scheme in schemes):
        return "awq"
    if schemes and all((scheme.get("num_bits"), scheme.get("type")) == (8, "float") for scheme in schemes):
        return "fp8"
    return "other"
