"""verify.py: the decoder, plain rounding, and the figures that a result is kept or thrown away by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize.tiny import blocks, make_model, quantized
from safetensors.torch import load_file, save_file

from yaptext.errors import QuantizeRefused
from yaptext.quantize import awq, verify
from yaptext.quantize.source import load

SHAPES = {"rows": st.integers(1, 4), "groups": st.integers(1, 4), "size": st.sampled_from([32, 64, 128])}
SEEDS = st.integers(0, 2**16)


def copied(tensors: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def decoded(source: Path, quantized: Path) -> Any:
    """The float model with the weights that a quantized checkpoint stands for."""
    return load(source, on_cuda=False, stored=verify.decoded(quantized))


# Plain rounding


def in_groups(rows: int, groups: int, size: int, scale: float, shift: float, seed: int) -> tuple[torch.Tensor, int]:
    """Weights of a layer, [rows, groups * size], and the size of a group."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, groups * size, generator=generator) + shift) * scale, size


WEIGHTS = st.builds(in_groups, **SHAPES, scale=st.floats(1e-3, 1e3), shift=st.floats(-2, 2), seed=SEEDS)


@settings(max_examples=50, deadline=None)
@given(WEIGHTS)
def test_rounding_stays_within_half_a_step(drawn: tuple[torch.Tensor, int]) -> None:
    """Sixteen values a group, none further from its weight than the zero point's own rounding allows."""
    weight, size = drawn
    rounded = verify.rounded(weight, size)
    parts, whole = rounded.reshape(-1, size), weight.reshape(-1, size)
    assert all(len(group.unique()) <= 16 for group in parts)
    low, high = whole.amin(1).clamp(max=0), whole.amax(1).clamp(min=0)  # zero itself is always one of the values
    inside = (whole.amin(1) <= 0) & (whole.amax(1) >= 0)
    step = (high - low) / 15
    assert ((parts - whole).abs().amax(1)[inside] <= step[inside] * 1.01 + 1e-6).all()


@settings(max_examples=50, deadline=None)
@given(WEIGHTS)
def test_rounding_is_what_autoawq_does_last(drawn: tuple[torch.Tensor, int]) -> None:
    """The same format: what it is compared with is AWQ less its search."""
    from awq.quantize.quantizer import AwqQuantizer

    weight, size = drawn
    theirs: Any = object.__new__(AwqQuantizer)
    theirs.group_size, theirs.zero_point, theirs.w_bit = size, True, 4
    assert torch.equal(verify.rounded(weight, size), theirs.pseudo_quantize_tensor(weight)[0])


def test_rounding_twice_is_rounding_once() -> None:
    """A group that spans zero and holds its own limits stays as it is, whatever its type."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    once = verify.rounded(weight, 64)
    assert torch.allclose(verify.rounded(once, 64), once, atol=1e-6)
    assert verify.rounded(weight.half(), 64).dtype == torch.float16
    assert not verify.rounded(torch.zeros(2, 64), 64).any()


# The decoder


@settings(max_examples=50, deadline=None)
@given(**SHAPES, seed=SEEDS)
def test_what_was_packed_is_decoded(rows: int, groups: int, size: int, seed: int) -> None:
    """Every number of every column, its own group's zero point and scale."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = 8 * rows, groups * size
    values = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 16, (groups, outputs), generator=generator)
    scales = torch.rand(groups, outputs, generator=generator).half()
    decoded = verify.dequantized(awq.pack(values), awq.pack(zeros), scales)
    assert decoded.shape == (outputs, inputs)
    for column in range(0, inputs, 17):
        group = column // size
        expected = (values[column] - zeros[group]) * scales[group].float()
        assert torch.equal(decoded[:, column], expected)


def test_our_decoder_agrees_with_autoawqs(result: Path) -> None:
    """The independent reading of the layout is the right one."""
    from awq.utils.packing_utils import dequantize_gemm

    tensors = load_file(result / "model.safetensors")
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(layers) == 14
    for layer in layers:
        parts = [tensors[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales")]
        theirs = dequantize_gemm(*parts, 4, 128).t().float()
        assert torch.allclose(verify.dequantized(*parts), theirs, atol=2e-3, rtol=2e-3), layer


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "stray"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.qzeros"), "model.layers.1.mlp.up_proj.qzeros"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.qweight"), "model.layers.1.mlp.up_proj.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(1)}), "model.norm.weight"),
        (
            lambda tensors: tensors.update(
                {f"model.layers.0.self_attn.{name}": tensors[f"model.layers.0.mlp.up_proj.{part}"].clone()
                 for part in ("qweight", "qzeros", "scales") for name in [f"q_proj.{part}"]}
            ),
            "model.layers.0.self_attn.q_proj.weight",
        ),
    ],
    ids=["no norm", "stray", "no head", "no zeros", "no weights", "broadcast", "another layer's"],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_its_model_is_found(
    model: Path, result: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    """What is missing, left over or of another shape means that something else would be served than was measured."""
    tensors = load_file(result / "model.safetensors")
    change(tensors)
    with pytest.raises(QuantizeRefused, match=rf"^the quantized checkpoint does not fit its model: {named}$"):
        decoded(model, copied(tensors, tmp_path / "awq"))


def test_shards_are_one_checkpoint(model: Path, result: Path, tmp_path: Path) -> None:
    """Those that the index names; a second copy of the weights beside them is not counted, nor read."""
    tensors = load_file(result / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"stray": torch.zeros(1000)}, tmp_path / "consolidated.safetensors")
    whole, sharded = decoded(model, result), decoded(model, tmp_path)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, sharded.get_parameter(name)), name
    assert verify.weight_bytes(tmp_path) == sum((tmp_path / file).stat().st_size for file in parts)


# The figures


def test_the_figures_are_the_textbooks(model: Path, result: Path) -> None:
    """Perplexity, KL divergence and top-1 agreement, computed another way."""
    held_out = blocks(3, seed=9)
    report = verify.Reference(model, held_out, 128, on_cuda=False).compare(result)
    exact, quantized = load(model, on_cuda=False), decoded(model, result)
    ids = torch.tensor(held_out)
    with torch.inference_mode():
        ours, theirs = (each(ids, labels=ids) for each in (exact, quantized))
    logprobs = [torch.log_softmax(output.logits.flatten(0, 1), -1) for output in (theirs, ours)]
    same = (logprobs[0].argmax(-1) == logprobs[1].argmax(-1)).float().mean().item()
    weights = sum(parameter.numel() for parameter in exact.parameters())
    kl = torch.nn.functional.kl_div(*logprobs, reduction="batchmean", log_target=True)
    assert report.tokens == ids.numel()
    assert report.awq.kl == pytest.approx(kl.item(), rel=1e-3)
    assert report.awq.perplexity == pytest.approx(math.exp(theirs.loss.item()), rel=1e-3)
    assert report.float_.perplexity == pytest.approx(math.exp(ours.loss.item()), rel=1e-3)
    assert report.awq.top1 == pytest.approx(same, abs=1e-4)
    assert report.bytes_per_weight == pytest.approx(report.awq_bytes / weights, abs=1e-3)


def test_the_float_model_itself_diverges_from_nothing(model: Path) -> None:
    """A checkpoint that holds the float weights has KL 0 and the same perplexity."""
    report = verify.Reference(model, blocks(2), 128, on_cuda=False).compare(model)
    assert (report.awq.kl, report.awq.top1, report.awq.layer_errors) == (0, 1, [0, 0])
    assert report.awq.perplexity == report.float_.perplexity
    assert report.rounding.kl > 0 and report.worthwhile


def test_tied_weights_count_once(tmp_path: Path) -> None:
    """An embedding that is the head as well is stored once, and in both places when it is measured."""
    source = make_model(tmp_path / "float", "qwen2", outliers=True, tie_word_embeddings=True)
    report = quantized(source, tmp_path / "awq")
    assert report.awq.kl < report.rounding.kl / 5
    model = decoded(source, tmp_path / "awq")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert report.bytes_per_weight == pytest.approx(report.awq_bytes / weights, abs=1e-3)
    assert not [name for name in load_file(tmp_path / "awq" / "model.safetensors") if "lm_head" in name]


@pytest.mark.parametrize(
    ("kl", "worthwhile"), [(0.1, True), (0.2, False), (0.3, False), (math.nan, False), (math.inf, False)]
)
def test_only_what_beats_rounding_is_worth_it(kl: float, worthwhile: bool) -> None:
    """As good is not better, and what is no number is not either."""
    quality = verify.Quality(10.0, 0.2, 0.9, [])
    report = verify.Report(100, quality, replace(quality, kl=kl), quality, 1, 1, 1.0)
    assert report.worthwhile == worthwhile
    assert set(json.loads(json.dumps(report.as_data()))) >= {"float", "awq", "rounding", "tokens", "awq_bytes"}
