"""The float model that a quantization begins with: whole and finite, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yaptext.errors import QuantizeRefused

LARGEST = 65_504.0
"""The largest number of half precision, in which all that stays unquantized is kept."""
_COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Ends of tensors that old checkpoints hold and a model computes itself."""


def load(folder: Path, *, on_cuda: bool) -> Any:
    """The model in `folder`, on the CPU, as float32 or (for a card) as it is stored.

    Raises `QuantizeRefused` if its weights are not those that its config.json asks for: transformers would fill what is
    missing with random numbers, drop what is left over, and only log it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # Half precision is emulated on most CPUs: float is many times faster there.
    dtype = "auto" if on_cuda else torch.float32
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    for kind, sentence in _WRONG.items():
        keys = [key if isinstance(key, str) else str(key[0]) for key in told.get(kind, ())]
        if names := sorted(key for key in keys if not key.endswith(_COMPUTED)):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise QuantizeRefused(sentence.format(names[0] + more))
    return model.eval()


_WRONG = {
    "missing_keys": "the weights do not fit their config.json: they lack {}",
    "unexpected_keys": "the weights do not fit their config.json: it has no place for {}",
    "mismatched_keys": "the weights do not fit their config.json: another shape in {}",
}


def check_finite(model: Any) -> None:
    """Raises `QuantizeRefused` if a tensor holds NaN, infinity, or more than half precision can."""
    import torch

    with torch.inference_mode():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.is_meta:
                continue
            low, high = (float(bound) for bound in tensor.aminmax())
            if not (low > float("-inf") and high < float("inf")):  # NaN compares as false
                raise QuantizeRefused(f"the tensor {name} holds numbers that are not finite")
            if max(-low, high) > LARGEST:
                raise QuantizeRefused(
                    f"the tensor {name} reaches {max(-low, high):.4g}; half precision, in which AWQ computes, "
                    f"ends at {LARGEST:.0f}"
                )
