"""awq.py: real autoawq on CPU on tiny models, and the files it leaves."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize.tiny import blocks, make_model, quantized, raise_values, scaled_alone
from safetensors.torch import load_file, save_file

from yaptext.errors import QuantizeRefused
from yaptext.quantize import awq, mapping
from yaptext.quantize.kept import KEPT_FILES
from yaptext.quantize.plan import Layer, plan
from yaptext.quantize.source import load


@pytest.mark.parametrize("outliers", [False, True], ids=["even", "outliers"])
@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "llama"])
def test_awq_beats_plain_rounding(tmp_path: Path, architecture: str, outliers: bool) -> None:
    """On every architecture; five times and more where a few channels carry most, as in trained models."""
    report = quantized(make_model(tmp_path / "float", architecture, outliers=outliers), tmp_path / "awq")
    assert report.float_.kl == 0 and report.float_.top1 == 1
    assert report.awq.kl < report.rounding.kl / (5 if outliers else 1)
    assert report.worthwhile and report.awq.top1 > report.rounding.top1
    assert len(report.awq.layer_errors) == len(report.rounding.layer_errors) == 2


def test_without_its_own_backup_autoawq_ruins_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU its backup of the weights is the weights: this is what the override is there for."""
    make = awq.quantizer_class

    def unsafe(done: Callable[[Layer], None], dtype: Any) -> Any:
        quantizer: Any = make(done, dtype)
        del quantizer._compute_best_scale
        return quantizer

    monkeypatch.setattr(awq, "quantizer_class", unsafe)
    with pytest.raises(QuantizeRefused, match="scaling changes layer 0 by"):
        quantized(make_model(tmp_path / "float", "llama", outliers=True), tmp_path / "awq")


def test_clipping_is_autoawqs_own() -> None:
    """Over the same tokens the second moments choose the limits that multiplying everything out chooses."""
    from awq.quantize.quantizer import AwqQuantizer

    torch.manual_seed(1)
    ours = awq.quantizer_class(lambda layer: None)
    quantizer: Any = object.__new__(ours)
    quantizer.group_size, quantizer.zero_point, quantizer.w_bit = 64, True, 4
    weight, inputs = torch.randn(128, 256) * torch.rand(128, 1), torch.randn(1, 200, 256)
    quick = quantizer._compute_best_clip(weight, inputs)
    slow = AwqQuantizer._compute_best_clip(quantizer, weight, inputs)
    assert quick.shape == slow.shape
    # Where two limits are as good, rounding may decide for either.
    assert ((quick - slow).abs() < 1e-6).float().mean() > 0.99


@pytest.mark.parametrize("bias", [False, True])
def test_packing_is_autoawqs_own(bias: bool) -> None:
    """Bit for bit, whatever the layer."""
    from awq.quantize.quantizer import AwqQuantizer

    torch.manual_seed(2)
    packed = []
    for kind in (awq.quantizer_class(lambda layer: None), AwqQuantizer):
        quantizer: Any = object.__new__(kind)
        quantizer.group_size, quantizer.zero_point, quantizer.w_bit, quantizer.version = 64, True, 4, "gemm"
        quantizer.begun, quantizer.modules = 0.0, []
        torch.manual_seed(2)
        module = torch.nn.Sequential(torch.nn.Linear(256, 192, bias=bias), torch.nn.Linear(4, 4))
        quantizer._apply_quant(module, {"0": module[0]})
        packed.append(module[0].state_dict())
    ours, theirs = packed
    assert ours.keys() == theirs.keys() >= {"qweight", "qzeros", "scales"}
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_layers_are_told_one_by_one(model: Path, tmp_path: Path) -> None:
    """Who waits hours sees how far it is."""
    told: list[Layer] = []
    awq.quantize(model, tmp_path, blocks(4), 128, on_cuda=False, done=told.append)
    assert [(layer.number, layer.count) for layer in told] == [(1, 2), (2, 2)]
    assert all(layer.seconds > 0 for layer in told)


def shaped(folder: Path, hidden: int, inner: int) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": hidden // 4}
    return make_model(folder, "llama", outliers=False, hidden_size=hidden, intermediate_size=inner, **heads)


@pytest.mark.parametrize(("hidden", "inner", "size"), [(256, 512, 128), (192, 512, 64), (256, 576, 64)])
def test_the_largest_group_that_divides_every_layer(tmp_path: Path, hidden: int, inner: int, size: int) -> None:
    """Found by itself; a size of the user's own is taken or refused."""
    folder = shaped(tmp_path, hidden, inner)
    assert plan(folder).group_size == size
    assert plan(folder, "32").group_size == 32
    if size < 128:
        with pytest.raises(QuantizeRefused, match="inputs, which no group of 128 divides"):
            plan(folder, "128")


def test_outputs_that_no_kernel_computes_are_refused(tmp_path: Path) -> None:
    """The line names the layer, its size and what would do."""
    with pytest.raises(QuantizeRefused, match=r"mlp.gate_proj has 608 outputs; AWQ needs a multiple of 64"):
        plan(shaped(tmp_path, 192, 608))


@pytest.mark.parametrize(
    ("architecture", "kv_heads"), [*((name, 2) for name in mapping.MAPPINGS), ("llama", 4), ("phi3", 4), ("cohere", 4)]
)
def test_every_architecture_that_is_named_can_be_done(tmp_path: Path, architecture: str, kv_heads: int) -> None:
    """Scaling alone, before anything is rounded, leaves the logits as they were, whatever the outliers of norms and
    values; and what is kept is nearer to the float model than rounding."""
    source = make_model(tmp_path / "float", architecture, outliers=True, num_key_value_heads=kv_heads)
    raise_values(source)
    assert scaled_alone(source) < 1e-4
    report = quantized(source, tmp_path / "awq")
    assert 0 < report.awq.kl < report.rounding.kl


def test_groups_that_change_the_function_are_found_at_the_first_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an architecture that another release of transformers has changed, or of a mapping that is wrong."""
    source = make_model(tmp_path / "float", "olmo2", outliers=True)
    monkeypatch.setitem(mapping.MAPPINGS, "olmo2", replace(mapping.MAPPINGS["llama"], attention_norm=None))
    with pytest.raises(QuantizeRefused, match=r"scaling changes layer 0 by \d+.\d\d%"):
        awq.search(load(source, on_cuda=False), blocks(4), 64)


def test_what_belongs_to_the_source_is_kept_byte_for_byte(model: Path, result: Path) -> None:
    """Tokenizer, template, generation config; of the config all but how the weights are stored."""
    kept = [name for name in KEPT_FILES if (model / name).exists()]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= set(kept)
    for name in kept:
        assert (result / name).read_bytes() == (model / name).read_bytes(), name
    source = json.loads((model / "config.json").read_text())
    config = json.loads((result / "config.json").read_text())
    stored = config.pop("quantization_config")
    assert (stored["quant_method"], stored["bits"], stored["group_size"], stored["zero_point"]) == ("awq", 4, 128, True)
    assert config.pop("dtype") == "float16"
    source.pop("dtype", None)
    assert config == source


def test_nothing_is_made_up_beside_the_weights(tmp_path: Path) -> None:
    """autoawq writes a generation config of its own where the model came without one."""
    source = make_model(tmp_path / "float", "llama", outliers=False)
    (source / "generation_config.json").unlink()
    (tmp_path / "awq").mkdir()
    awq.quantize(source, tmp_path / "awq", blocks(4), 128, on_cuda=False, done=lambda layer: None)
    lying = {file.name for file in (tmp_path / "awq").iterdir()}
    assert lying == {file.name for file in source.iterdir()} >= {"model.safetensors", "tokenizer.json"}


def test_the_quantized_model_leaves_memory(model: Path, tmp_path: Path) -> None:
    """Before the float model is loaded again to measure: it hangs in a circle, which nobody else would break."""
    from awq.modules.linear import WQLinear_GEMM

    gc.disable()
    try:
        awq.quantize(model, tmp_path, blocks(4), 128, on_cuda=False, done=lambda layer: None)
        assert not [thing for thing in gc.get_objects() if type(thing) is WQLinear_GEMM]
    finally:
        gc.enable()


def test_what_stays_unquantized_is_in_half_precision(result: Path) -> None:
    """Embeddings in 32 bits would be half of a small checkpoint."""
    tensors = load_file(result / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int32}


def test_what_half_precision_does_not_hold_is_kept_in_bfloat16(tmp_path: Path) -> None:
    """A norm weight of 1e5, as some models have: vLLM computes AWQ in both types."""
    source = make_model(tmp_path / "float", "llama", outliers=False)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] *= 1e4
    for part in "qkv":
        tensors[f"model.layers.1.self_attn.{part}_proj.weight"] /= 1e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = quantized(source, tmp_path / "awq")
    assert report.awq.kl < report.rounding.kl
    stored = load_file(tmp_path / "awq" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.int32}
    assert json.loads((tmp_path / "awq" / "config.json").read_text())["dtype"] == "bfloat16"


def test_sizes_are_those_of_the_files(model: Path, result: Path) -> None:
    """The plan's estimate, which the disk is asked for, is near them."""
    size = os.path.getsize(result / "model.safetensors")
    assert size == pytest.approx(plan(model).awq_bytes, rel=0.05)
