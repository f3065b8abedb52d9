"""What a model's shape allows, before a weight is read: its layers, the group size, the bytes before and after."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaptext.errors import QuantizeRefused
from yaptext.quantize.source import architecture

GROUP_SIZES = (128, 64, 32)
LAYER = r"(model\.|language_model\.)*layers\.\d+\."
"""How the name of a decoder layer's part begins, in a model of text or of text and images."""
_OUT_MULTIPLE = 64
"""vLLM's 4-bit kernels compute this many outputs at once."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer is done. `seconds` is its own time."""

    number: int
    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a model allows: its decoder layers' count, the group size, and the weights' bytes before and after."""

    layers: int
    group_size: int
    float_bytes: int
    awq_bytes: int


def plan(folder: Path, wanted: str = "auto", kept: str = "") -> Plan:
    """Looks at the model's shape without loading a weight. `wanted` is auto, 128, 64 or 32; `kept` is a pattern for the
    parts of a decoder layer that stay as they are.

    Raises `QuantizeRefused` for layers that no group size divides, or that have too few outputs for a kernel.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = architecture(config)(config)
    weights = dict(quantized_weights(model, kept))
    for name, weight in weights.items():
        outputs = weight.shape[-2] // (2 if name.endswith("experts.gate_up_proj") else 1)
        if outputs % _OUT_MULTIPLE:
            raise QuantizeRefused(
                f"layer {_short(name)} has {outputs} outputs; AWQ needs a multiple of {_OUT_MULTIPLE}"
            )
    sizes = [int(wanted)] if wanted != "auto" else GROUP_SIZES
    inputs = {name: weight.shape[-1] for name, weight in weights.items()}
    fitting = [size for size in sizes if all(count % size == 0 for count in inputs.values())]
    if not fitting:
        name = next(name for name, count in inputs.items() if count % sizes[-1])
        raise QuantizeRefused(
            f"layer {_short(name)} has {inputs[name]} inputs, which no group of {' or '.join(map(str, sizes))} divides"
        )
    quantized = sum(weight.numel() for weight in weights.values())
    rest = sum(parameter.numel() for parameter in model.parameters()) - quantized
    bits = 4 + (16 + 4) / fitting[0]  # a weight, and its share of a scale and a zero point
    layers = sum(1 for name, _ in model.named_modules() if re.fullmatch(LAYER, f"{name}."))
    return Plan(layers, fitting[0], 2 * (quantized + rest), int(quantized * bits / 8) + 2 * rest)


def quantized_weights(model: Any, kept: str = "") -> Iterator[tuple[str, Any]]:
    """The weights that become 4 bits, [..., out, in], by name: of every linear layer inside the decoder layers, and of
    every expert. `kept` is a pattern for the parts of a decoder layer that stay as they are."""
    import torch

    for name, module in model.named_modules():
        part = re.match(LAYER, name)
        if part and isinstance(module, torch.nn.Linear) and not re.fullmatch(kept, name[part.end() :]):
            yield name, module.weight
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and re.fullmatch(rf"{LAYER}.*experts\.(gate_up|down)_proj", name):
            yield name, parameter


def _short(name: str) -> str:
    """7.mlp.gate_proj of model.layers.7.mlp.gate_proj."""
    return name.rpartition("layers.")[2]
