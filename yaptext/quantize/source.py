"""The float model that a quantization begins with: whole and finite, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from yaptext.engine import header
from yaptext.errors import QuantizeRefused

_LARGEST = 65_504.0 / 16
"""A sixteenth of the largest number of half precision: scaling makes some numbers larger."""
_COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Ends of tensors that old checkpoints hold and a model computes itself."""


def load(folder: Path, *, on_cuda: bool, stored: Mapping[str, Any] | None = None) -> Any:
    """The model in `folder`, on the CPU, as float32 or (for a card) as it is stored; `stored` takes the place of its
    weights.

    Raises `QuantizeRefused` if its weights are not those that its config.json asks for: transformers would fill what is
    missing with random numbers, drop what is left over, and only log it.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    how = getattr(config, "quantization_config", None)
    if how is not None and not (isinstance(how, dict) and how.get("quant_method")):
        del config.quantization_config  # transformers would ask it for a method
    # Half precision is emulated on most CPUs: float is many times faster there.
    dtype: Any = "auto" if on_cuda else torch.float32
    given: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    given["ignore_mismatched_sizes"] = True  # and names them
    if stored is None:
        model, told = architecture(config).from_pretrained(folder, config=config, **given)
    else:
        if on_cuda:  # auto would look at the first of the weights
            given["dtype"] = config.dtype or torch.bfloat16
        model, told = architecture(config).from_pretrained(None, config=config, state_dict=stored, **given)
    for kind, sentence in _WRONG.items():
        keys = [key if isinstance(key, str) else str(key[0]) for key in told.get(kind, ())]
        if names := sorted(key for key in keys if not key.endswith(_COMPUTED)):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            if stored is not None:
                raise QuantizeRefused(f"the quantized checkpoint does not fit its model: {names[0]}")
            raise QuantizeRefused(sentence.format(names[0] + more))
    return model.eval()


def architecture(config: Any) -> Any:
    """The class that config.json names: the automatic one leaves out what sees images, and its weights."""
    import transformers

    name = (config.architectures or [""])[0]
    named = getattr(transformers, name, None) if name.endswith(("ForCausalLM", "ForConditionalGeneration")) else None
    if getattr(named, "config_class", None) is type(config):
        return named
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


_WRONG = {
    "missing_keys": "the weights do not fit their config.json: they lack {}. Take both from the same place",
    "unexpected_keys": "the weights do not fit their config.json: its model has no {}. Take both from the same place",
    "mismatched_keys": "the weights do not fit their config.json: another shape in {}. Take both from the same place",
}


def check_finite(model: Any) -> None:
    """Raises `QuantizeRefused` if a tensor holds NaN or infinity."""
    for name, low, high in _bounds(model):
        if not (low > float("-inf") and high < float("inf")):  # NaN compares as false
            raise QuantizeRefused(
                f"the tensor {name}{_file_of(model, name)} holds numbers that are not finite: the weights are damaged; "
                "take an earlier version of them"
            )


def dtype_that_holds(model: Any) -> Any:
    """The type for what stays unquantized: half precision, or bfloat16 if that holds what half precision does not."""
    import torch

    fits = all(max(-low, high) <= _LARGEST for _, low, high in _bounds(model))
    return torch.float16 if fits else torch.bfloat16


def _bounds(model: Any) -> Iterator[tuple[str, float, float]]:
    """Every tensor of floats by name, with its least and greatest number."""
    import torch

    with torch.inference_mode():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and not tensor.is_meta:
                low, high = tensor.aminmax()
                yield name, float(low), float(high)


def _file_of(model: Any, name: str) -> str:
    """Which file holds a tensor, in words; none if that is not known, as of tensors that transformers fuses."""
    folder = getattr(model, "name_or_path", "")
    try:
        file = header.places(Path(folder)).get(name) if folder else None
    except (OSError, ValueError):
        file = None
    return f" in {file.name}" if file else ""
