"""source.py: weights that do not fit their config, or that half precision cannot hold, are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize.tiny import make_model
from safetensors.torch import load_file, save_file

from yaptext.errors import QuantizeRefused
from yaptext.quantize import source

_NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path, "llama", outliers=False)


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_norm_is_named(folder: Path) -> None:
    """transformers would take ones for it, and quantize that."""
    change(folder, lambda tensors: tensors.pop(_NORM))
    with pytest.raises(
        QuantizeRefused, match=rf"do not fit their config.json: they lack {_NORM}. Take both from the same place$"
    ):
        source.load(folder, on_cuda=False)


def test_missing_biases_are_counted(folder: Path) -> None:
    """The config says that there are some."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(QuantizeRefused, match=r"they lack model.layers.0.self_attn.k_proj.bias and 7 more"):
        source.load(folder, on_cuda=False)


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "mlp.up_proj.weight_scale"])
def test_a_tensor_without_a_place_is_named(folder: Path, name: str) -> None:
    """A bias that the config denies, or the scales of weights in eight bits."""
    change(folder, lambda tensors: tensors.update({f"model.layers.0.{name}": torch.ones(1)}))
    with pytest.raises(
        QuantizeRefused, match=rf"its model has no model.layers.0.{name}. Take both from the same place$"
    ):
        source.load(folder, on_cuda=False)


def test_what_old_checkpoints_hold_besides_is_no_fault(folder: Path) -> None:
    """Frequencies that the model computes itself."""
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    source.load(folder, on_cuda=False)


def put(value: float) -> Callable[[dict[str, Any]], None]:
    """Puts a number into a norm."""

    def edit(tensors: dict[str, Any]) -> None:
        tensors[_NORM][3] = value

    return edit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    """With its file, before it reaches a manifest."""
    change(folder, put(value))
    line = rf"the tensor {_NORM} in model.safetensors holds numbers that are not finite: the weights are damaged; "
    with pytest.raises(QuantizeRefused, match=line):
        source.check_finite(source.load(folder, on_cuda=False))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1.0, torch.float16), (-4_000.0, torch.float16), (4_200.0, torch.bfloat16), (-1e5, torch.bfloat16)],
)
def test_what_half_precision_does_not_hold_bfloat16_does(folder: Path, value: float, dtype: torch.dtype) -> None:
    """One number decides, whatever its sign; what scaling may add to it is room for."""
    change(folder, put(value))
    loaded = source.load(folder, on_cuda=False)
    source.check_finite(loaded)
    assert source.dtype_that_holds(loaded) is dtype


@pytest.mark.parametrize("method", [None, ""])
def test_a_quantization_config_without_a_method_is_none(folder: Path, method: str | None) -> None:
    """transformers would ask it for one."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    source.check_finite(source.load(folder, on_cuda=False))


def test_a_sound_model_passes(folder: Path) -> None:
    """As it is."""
    source.check_finite(source.load(folder, on_cuda=False))
